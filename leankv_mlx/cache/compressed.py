"""`CompressedKVCache`: one layer's keys and values, compressed, behind mlx-lm's cache protocol."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.attention import View, attend_codes, attend_rows
from leankv_mlx.blocks import BlockPool, BlockTable
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.tracking import track
from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.format import TILE, Format, padded
from leankv_mlx.codec.rotation import rotation
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ShapeError, UnsupportedError
from leankv_mlx.kernels import (
    MAX_DECODE_TOKENS,
    Backend,
    Body,
    Centers,
    Mask,
    Rotations,
    Rows,
    resolve_backend,
)
from leankv_mlx.kernels.append import append
from leankv_mlx.kernels.dequantize import dequantize
from leankv_mlx.kernels.encode import encode

CENTER_TOKENS = 512
"""Body tokens that the centers are fitted on, at most."""


@dataclass(frozen=True)
class _Shape:
    """What the first update tells: KV heads and head dims."""

    heads: int
    k_dim: int
    v_dim: int


@dataclass
class _Calls:
    """Counts of what models do with the fetched arrays; shared with the closures of fetches."""

    fused: int = 0


class CompressedKVCache:
    """Sink tokens, a compressed body and a window of recent tokens; everything rotated.

    A call with up to 8 new tokens moves the oldest rows of a full window to the body first and
    keeps its own rows exact. A longer call (prefill) attends first and compresses within the call.

    Args:
        config: what to compress and how; a `--kv` text is read by `CompressionConfig.parse`.
        keep_fetched: hold the arrays of the last fetch until the next update, for models whose
            later layers ask for them through `keys_and_values` (they then get what was attended
            to, not its compressed form).

    Raises:
        BackendUnavailableError: the configured backend cannot run here.
    """

    _exact: Rows  # this and the next come with _shape
    _rotations: Rotations

    def __init__(
        self, config: CompressionConfig | str = "leankv", keep_fetched: bool = False
    ) -> None:
        self.config = CompressionConfig.parse(config) if isinstance(config, str) else config
        self.keep_fetched = keep_fetched
        self._backend: Backend = resolve_backend(self.config.backend)
        self._reset()

    def _reset(self) -> None:
        self.offset = 0
        self._shape: _Shape | None = None  # _exact, _rotations and _format come with it
        self._calls = _Calls()
        self._table: BlockTable | None = None
        self._centers: Centers | None = None
        self._equalizer: Equalizer | None = None  # of all keys here, once there is a body
        # Weak: a fetch holds the working copy of its layer.
        self._fetched: tuple[weakref.ref[mx.array], weakref.ref[mx.array]] | None = None
        self._held: tuple[mx.array, mx.array] | None = None

    # The cache protocol of mlx-lm.

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens and return all of them as lazy arrays.

        Args:
            keys: [1, H, L, k_head_dim], after RoPE.
            values: [1, H, L, v_head_dim].

        Returns:
            Keys and values of all tokens, [1, H, N, head_dim]. Attention that is given these very
            objects (see `owner_of`) reads the cache instead.

        Raises:
            UnsupportedError: a batch above 1.
            ShapeError: the arrays do not fit each other or earlier ones.
        """
        self._check(keys, values)
        self._fetched = self._held = None  # nothing may hold the pool while it is written
        prefill = keys.shape[2] > MAX_DECODE_TOKENS
        if not prefill:
            self._compress()
        k = self._equalizer.apply(keys[0]) if self._equalizer else keys[0]
        new = Rows(k, values[0])
        self._exact = append(self._exact, new, self._rotations, self._backend)
        self.offset += keys.shape[2]
        view = self.view()
        if not prefill:
            return self._track(view, None)
        # One layer at a time: a lazy graph of all layers would hold all their working copies.
        rows = view.rows()
        mx.eval(rows)
        fetched = self._track(view, rows)
        self._compress()
        mx.eval(self.state)
        return fetched

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The arrays of the last `update_and_fetch` while they live, else equal ones.

        Raises:
            UnsupportedError: the cache is empty.
        """
        if self._fetched is not None:
            keys, values = (fetched() for fetched in self._fetched)
            if keys is not None and values is not None:
                return keys, values
        return self._track(self.view(), None)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask of the next N tokens, as mlx-lm's own caches make it."""
        if window_size is None and not return_array:
            return None if N == 1 else "causal"
        if window_size is None and N == 1:
            return None
        columns = mx.arange(self.offset + N)
        rows = mx.arange(self.offset, self.offset + N)[:, None]
        mask = rows >= columns
        return mask if window_size is None else mask & (rows < columns + window_size)

    def is_trimmable(self) -> bool:
        """True: any number of tokens can be removed from the end."""
        return True

    def trim(self, n: int) -> int:
        """Remove the last n tokens (all, if there are fewer); returns how many were removed.

        Below the window the block that is cut is decoded, and its surviving slots become the
        window. When no body is left the centers are forgotten and fitted anew.
        """
        n = max(0, min(n, self.offset))
        if n == 0:
            return n
        self._fetched = self._held = None
        self.offset -= n
        window = self._exact.k.shape[1] - self._sinks
        if n <= window:
            self._exact = Rows(*(_owned(x[:, : x.shape[1] - n]) for x in self._exact))
        else:
            self._trim_body()
        return n

    def size(self) -> int:
        """Tokens in the cache."""
        return self.offset

    def empty(self) -> bool:
        """True before the first token."""
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.memory().used

    @property
    def state(self) -> list[Any]:
        """Everything that `from_state` needs: settings, numbers and arrays."""
        if self._shape is None:
            return [self.config.spec(), self.keep_fetched]
        shape = self._shape
        head: list[Any] = [
            self.config.spec(), self.keep_fetched, self.offset, shape.heads, shape.k_dim,
            shape.v_dim, *self._exact,
        ]  # fmt: skip
        if self._table is None or self._centers is None:
            return head
        scales = [self._equalizer.scales] if self._equalizer else []
        return [*head, *self._centers, self._table.pool.array, *self._table.arrays(), *scales]

    @state.setter
    def state(self, value: list[Any]) -> None:
        spec, keep_fetched, *rest = value
        CompressedKVCache.__init__(self, spec, keep_fetched)
        if not rest:
            return
        offset, heads, k_dim, v_dim, k, v, *body = rest
        self.offset = offset
        self._start(_Shape(heads, k_dim, v_dim), Rows(k, v))
        if body:
            mu_k, mu_v, blocks, ids, lengths, *scales = body
            self._centers = Centers(mu_k, mu_v)
            self._equalizer = Equalizer(*scales) if scales else None
            ids, lengths = np.array(ids), np.array(lengths)
            owned = ids[np.arange(ids.shape[1]) < -(-lengths // TILE)[:, None]]
            pool = BlockPool.holding(blocks, owned)
            self._table = BlockTable.holding(pool, ids, lengths)

    @classmethod
    def from_state(cls, state: list[Any]) -> CompressedKVCache:
        """A cache with the content of `state`."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedKVCache:
        """An independent copy that shares the blocks until one of the two changes them."""
        copy = CompressedKVCache(self.config, self.keep_fetched)
        if self._shape:
            copy._start(self._shape, self._exact)  # arrays are replaced, never changed
        copy.offset, copy._centers = self.offset, self._centers
        copy._equalizer = self._equalizer
        copy._table = self._table.copy() if self._table else None
        memo[id(self)] = copy
        return copy

    # What the rest of the project asks for.

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def fused_calls(self) -> int:
        """How often attention read the cache itself instead of its decoded arrays."""
        return self._calls.fused

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in an uncompressed fp16 cache."""
        if self._shape is None:
            return 0
        return 2 * self.offset * self._shape.heads * (self._shape.k_dim + self._shape.v_dim)

    def memory(self) -> CacheMemory:
        """Bytes of this layer, counted from its buffers."""
        if self._shape is None:
            return CacheMemory()
        exact = sum(x.nbytes for x in self._exact)
        centers = sum(x.nbytes for x in self._centers) if self._centers else 0
        centers += self._equalizer.scales.nbytes if self._equalizer else 0
        if self._table is None:
            return CacheMemory(exact=exact, centers=centers, allocated=exact + centers)
        pool, tables = self._table.pool, self._table.nbytes
        scales = self._table.blocks * TILE * 4
        return CacheMemory(
            codes=self._table.blocks * pool.block_nbytes - scales,
            scales=scales,
            tables=tables,
            exact=exact,
            centers=centers,
            allocated=pool.nbytes + tables + exact + centers,
        )

    def view(self) -> View:
        """This layer as attention sees it.

        Raises:
            UnsupportedError: the cache is empty.
        """
        if self._shape is None:
            raise UnsupportedError("an empty cache has no tokens to attend to.")
        bodies = []
        if self._table:
            ids, lengths = self._table.arrays()
            full = bool((self._table.lengths == TILE * self._table.ids.shape[1]).all())
            bodies = [Body(self._table.pool.array, ids, lengths, self._format, full)]
        return View(
            bodies,
            self._exact,
            self._centers,
            self._sinks,
            self._rotations,
            self._backend,
        )

    def _start(self, shape: _Shape, exact: Rows) -> None:
        self._shape = shape
        self._exact = exact
        name = self.config.rotation
        self._rotations: Rotations = (
            rotation(name, shape.k_dim), rotation(name, shape.v_dim),
        )  # fmt: skip
        self._format = Format.of(self.config.k_bits, self.config.v_bits, shape.k_dim, shape.v_dim)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"[update_and_fetch] expected keys [1, H, L, D] and values [1, H, L, Dv], "
                f"got {keys.shape} and {values.shape}."
            )
        batch, heads, tokens, _ = keys.shape
        if batch != 1:
            raise UnsupportedError(
                f"the compressed cache holds one sequence, got a batch of {batch}; "
                "run the prompts one at a time, or without --kv."
            )
        if tokens == 0:
            raise ShapeError("[update_and_fetch] expected at least one token, got 0.")
        shape = _Shape(heads, keys.shape[3], values.shape[3])
        if self._shape is None:
            self._start(
                shape,
                Rows(
                    mx.zeros((heads, 0, padded(shape.k_dim)), keys.dtype),
                    mx.zeros((heads, 0, padded(shape.v_dim)), values.dtype),
                ),
            )
        elif shape != self._shape:
            raise ShapeError(f"[update_and_fetch] expected {self._shape}, got {shape}.")

    @property
    def _sinks(self) -> int:
        return min(self.config.sink_tokens, self._exact.k.shape[1])

    def _track(self, view: View, rows: Rows | None) -> tuple[mx.array, mx.array]:
        """Lazy arrays of all tokens; `rows` is their working copy if this is a prefill."""
        calls, equalizer = self._calls, self._equalizer  # the closure must not hold the cache

        def attend(
            queries: mx.array, scale: float, mask: Mask, sink_logits: mx.array | None
        ) -> mx.array:
            calls.fused += 1
            if equalizer:
                queries = equalizer.queries(queries)
            if rows is None and queries.shape[2] <= MAX_DECODE_TOKENS:
                return attend_codes(queries, view, scale=scale, mask=mask, sink_logits=sink_logits)
            return attend_rows(
                queries, rows or view.rows(), view, scale=scale, mask=mask,
                sink_logits=sink_logits,
            )  # fmt: skip

        keys, values = view.unrotated(rows) if rows else view.fetched()
        if equalizer:
            keys = equalizer.undo(keys[0])[None]
        track(keys, values, attend)
        self._fetched = weakref.ref(keys), weakref.ref(values)
        if self.keep_fetched:
            self._held = keys, values
        return keys, values

    def _compress(self) -> None:
        """Move the oldest rows of the window to the body, a block at a time, down to its size."""
        sinks = self._sinks
        window = self._exact.k.shape[1] - sinks
        blocks = (window - self.config.window) // TILE
        if blocks < 1:
            return
        stop = sinks + blocks * TILE
        if self._table is None and self.config.equalize:
            self._equalize(sinks, stop)
        moved = Rows(*(x[:, sinks:stop] for x in self._exact))
        if self._table is None or self._centers is None:
            self._table = BlockTable(BlockPool(self._format.words), moved.k.shape[0])
            means = (x[:, :CENTER_TOKENS].astype(mx.float32).mean(axis=1) for x in moved)
            self._centers = Centers(*(x if self.config.center else mx.zeros_like(x) for x in means))
        codes = encode(moved, self._centers, self._format, self.config.rounding, self._backend)
        ids = self._table.append(blocks)
        self._table.pool.write(ids.ravel(), codes.reshape(-1, self._format.words))
        self._exact = Rows(
            *(mx.concatenate([x[:, :sinks], x[:, stop:]], axis=1) for x in self._exact)
        )

    def _equalize(self, start: int, stop: int) -> None:
        """Fit the equalizer on the first of the exact rows start..stop, and apply it to all."""
        keys = self._rotations[0].undo(self._exact.k)
        self._equalizer = Equalizer.fit(keys[:, start : min(stop, start + CENTER_TOKENS)])
        self._exact = Rows(self._rotations[0].apply(self._equalizer.apply(keys)), self._exact.v)

    def _trim_body(self) -> None:
        """Cut the body and the window to `offset` tokens; the window loses all its rows."""
        sinks = min(self._sinks, self.offset)
        exact = Rows(*(_owned(x[:, :sinks]) for x in self._exact))
        if self._table is not None and self._centers is not None:
            whole, rest = divmod(self.offset - sinks, TILE)
            if rest:
                ids, lengths = self._table.arrays()
                block = Body(
                    self._table.pool.array,
                    ids[:, whole : whole + 1],
                    lengths,
                    self._format,
                    True,
                )
                rows = dequantize(block, self._centers, exact.k.dtype, self._backend)
                exact = _joined(exact, Rows(*(x[:, :rest] for x in rows)))
                mx.eval(exact)  # what reads the pool must be done before it is written again
            self._table.truncate(np.full(self._table.heads, whole * TILE, np.int32))
            if not whole:
                if self._equalizer and self.offset:
                    keys = self._equalizer.undo(self._rotations[0].undo(exact.k))
                    exact = Rows(self._rotations[0].apply(keys), exact.v)
                self._table = self._centers = self._equalizer = None
        self._exact = exact


def _joined(a: Rows, b: Rows) -> Rows:
    return Rows(mx.concatenate([a.k, b.k], axis=1), mx.concatenate([a.v, b.v], axis=1))


def _owned(x: mx.array) -> mx.array:
    """A copy: a slice would keep the whole buffer behind it."""
    return mx.concatenate([x[:, :1], x[:, 1:]], axis=1)
