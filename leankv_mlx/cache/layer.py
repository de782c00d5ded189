"""The tokens of one layer: sink tokens, a compressed body and a window of recent tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.blocks import BlockTable
from leankv_mlx.cache.body import CompressedBody
from leankv_mlx.cache.equalizing import equalized, unequalized
from leankv_mlx.cache.exact import ExactRows, owned
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.seen import SeenQueries
from leankv_mlx.cache.shape import Shape
from leankv_mlx.cache.state import BodyState, LayerState
from leankv_mlx.cache.tier import Share
from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.format import TILE, Format, padded
from leankv_mlx.codec.space import Learned, Space
from leankv_mlx.config import CompressionConfig
from leankv_mlx.kernels import Backend, Centers, Rows, View, resolve_backend
from leankv_mlx.kernels.append import append
from leankv_mlx.kernels.gather import working_copy
from leankv_mlx.sparsity import LargestReceived, Observations

CENTER_TOKENS = 512
"""Tier tokens that the centers are fitted on, at most."""


class Layer:
    """Everything that is stored of one layer, rotated.

    Args:
        learned: which key channels codes keep once it is narrowed, or the basis of the keys; None
            for all channels as they are.

    Raises:
        ConfigError: that is for another shape.

    Attributes:
        shape: of every token.
        config: its settings.
        offset: tokens so far, dropped ones included.
        exact: uncompressed rows [H, E, D]: sink tokens, then the window. Their dtype is given; it
            need not be that of the rows that come. See `ExactRows`.
        dtype: of the keys that came last, and of what is fetched.
        body: the tokens between the two; None while there are none.
        space: that everything here is stored in; keys are equalized once there is a body, if that
            is configured.
        backend: who computes; the reference where the configured one does not support the layer.
        kind: equal for layers of sequences that one operation can take together.
        narrowed: whether codes keep only what `channels` says, see `narrow`.
        observations: the last queries, if a policy needs them.
        collector: if set, it is told of the attention of every prefill call.
        placed: tokens that had come when stored ones were last dropped or demoted; 0 if none ever
            were.
    """

    def __init__(
        self,
        shape: Shape,
        config: CompressionConfig,
        backend: Backend,
        dtypes: tuple[mx.Dtype, mx.Dtype],
        learned: Learned | None = None,
    ) -> None:
        if learned:
            shape.check(learned, config)
        self.shape = shape
        self.offset = 0
        self.body: CompressedBody | None = None
        self.observations = Observations() if config.policy.drops else None
        self.collector: LargestReceived | None = None
        self.placed = 0
        self._seen = SeenQueries()
        self._fitted = False
        self.space = Space.of(config.rotation, shape.k_dim, shape.v_dim, learned)
        dims = padded(shape.k_dim), padded(shape.v_dim)
        empty = (mx.zeros((shape.heads, 0, d), t) for d, t in zip(dims, dtypes, strict=True))
        self._exact = ExactRows(Rows(*empty), config.sink_tokens)
        self.dtype, self.config = dtypes[0], config
        formats = [Format.of(k, v, shape.k_dim, shape.v_dim) for k, v in config.tiers]
        self._whole = Share.all_of(formats, None)
        self._narrow = Share.all_of(formats, self.space.channels)
        self.narrowed, self._narrowed_at = False, 0
        supported = all(map(backend.supports, formats))
        self.backend = backend if supported else resolve_backend("reference")
        self.kind = _kind(shape, config, self.backend.name, *dtypes, learned)

    @property
    def exact(self) -> Rows:
        """All exact rows."""
        return self._exact.rows()

    @exact.setter
    def exact(self, rows: Rows) -> None:
        self._exact.replace(rows)

    @property
    def exact_arrays(self) -> list[mx.array]:
        """What holds them; copies have some in common."""
        return self._exact.arrays

    @property
    def tables(self) -> list[BlockTable]:
        """All that own blocks: those of the body, and what copies find common rows in."""
        stored = (table for encoded in self._exact.stored for table in encoded.tables)
        return [*(self.body.tables if self.body else ()), *stored]

    @property
    def tail(self) -> Rows:
        """The exact rows that new ones come behind, see `appended`."""
        return self._exact.tail

    @property
    def sinks(self) -> int:
        """How many of the exact rows are sink tokens."""
        return min(self.config.sink_tokens, self._exact.count)

    @property
    def ragged(self) -> bool:
        """Whether heads may lack tokens, or are stored apart: then nothing but attention of our own
        can read the layer."""
        return self.body is not None and self.body.ragged

    @property
    def settled(self) -> int:
        """Tokens that had come when something of stored ones last went; 0 if nothing ever did. What
        stands in front is what it is because they came, so it is a beginning of them only."""
        return max(self.placed, self._narrowed_at)

    @property
    def recent(self) -> int:
        """Tokens in the window: the last ones, exact."""
        return self._exact.count - self.sinks

    @property
    def leaving(self) -> tuple[int, int]:
        """Exact rows start..stop that are the next to leave the window; none where they agree."""
        rows = self._exact.count
        sinks = min(self.config.sink_tokens, rows)
        blocks = (rows - sinks - self.config.window) // TILE
        return sinks, sinks + max(0, blocks) * TILE

    @property
    def overfull(self) -> bool:
        """Whether any are."""
        start, stop = self.leaving
        return stop > start

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add tokens to the window: keys [H, L, k_head_dim] and values [H, L, v_head_dim]."""
        rows = Rows(self.space.scaled(keys), values)
        tail = append(self.tail, rows, self.space.rotations, self.backend)
        self.appended(tail, keys.shape[1], keys.dtype)

    def appended(self, tail: Rows, tokens: int, dtype: mx.Dtype) -> None:
        """Take the tail with so many new rows behind it, made of keys of this dtype."""
        self._exact.extend(tail)
        self.offset += tokens
        self.dtype = dtype

    def see(self, queries: mx.array, exact: Rows) -> None:
        """Be told of queries while the equalizer may still be fitted to them.

        Args:
            queries: [1, Hq, L, head_dim], of the last L tokens.
            exact: all tokens, as they were before any of them was compressed. A body that this
                update began, before its queries came, is made anew from them.
        """
        if not self.config.equalizes or self._fitted:
            return
        self._seen.add(queries.reshape(self.shape.heads, -1, self.shape.k_dim))
        if self.body is not None:
            self.exact, self.body, self.space = exact, None, replace(self.space, equalizer=None)
            self.compress()
            mx.eval(self.state)

    def compress(self, scores: NDArray[np.float32] | None = None) -> None:
        """Move the oldest rows of the window to the body, a block at a time, down to its size.

        Args:
            scores: their significance [H, T], if it is known.
        """
        start, stop = self.leaving
        if start == stop:
            return
        if self.body is None and self.config.equalizes:
            self._equalize(start, stop)
        moved = Rows(*(x[:, start:stop] for x in self.exact))
        if self.body is None:
            means = (x[:, :CENTER_TOKENS].astype(mx.float32).mean(axis=1) for x in moved)
            self.body = self._new_body(
                Centers(*(x if self.config.center else mx.zeros_like(x) for x in means))
            )
        stored = self._exact.known(stop - start)
        if stored is None or not self.body.append_known(stored):
            position = self.offset - (self._exact.count - start)
            self.body.append(moved, position, scores)
            shares = self._exact.common and not self.config.policy.drops
            stored = self.body.last(stop - start) if shares else None
        self._exact.leave(stop - start, stored)

    def narrow(self) -> None:
        """From now on codes keep only what the channels say: those that there are give up the rest,
        and so do tokens that come. It stays so whatever is trimmed, as a reply goes on from it."""
        if self.space.channels is None or self.narrowed:
            return
        self.narrowed, self._narrowed_at = True, self.offset
        self.kind = _kind(*self.kind, "narrowed")
        self._exact.forget_stored()
        if self.body is not None:
            self.body.narrow(self._narrow)

    def trim(self, n: int) -> None:
        """Remove the last n tokens; see `CompressedKVCache.trim`."""
        self.offset -= n
        if self.observations:
            self.observations.trim(self.offset)
        if n <= self.recent:
            self._exact.cut(n)
            return
        sinks = min(self.sinks, self.offset)
        exact = Rows(*(owned(x[:, :sinks]) for x in self.exact))
        if self.body is None:
            self.exact = exact
            return
        if self.body.ragged:
            self.body.keep_below(self.offset)
        else:
            whole, rest = divmod(self.offset - sinks, TILE)
            if rest:
                rows = self.body.rows(whole, exact.k.dtype)
                exact = Rows(
                    *(mx.concatenate([x, y[:, :rest]], 1) for x, y in zip(exact, rows, strict=True))
                )
                mx.eval(exact)  # what reads the pool must be done before it is written again
            self.body.cut(whole * TILE)
        if not self.body.slots and (not self.body.ragged or self.offset == sinks):
            self.space, exact = unequalized(self.space, exact)
            self.body, self._fitted, self.placed = None, False, 0
        self.exact = exact

    def view(self) -> View:
        """This layer as kernels see it."""
        return View(
            self.body.views() if self.body else [],
            self.exact,
            self.body.centers if self.body else None,
            self.sinks,
            self.space.rotations,
            self.config.skip,
        )

    def rows(self) -> Rows:
        """All tokens, see `kernels.gather.working_copy`."""
        return working_copy(self.view(), self.dtype, self.backend)

    def copy(self) -> Layer:
        """An independent copy that shares the blocks until one of the two changes them."""
        dtypes = self.tail.k.dtype, self.tail.v.dtype
        other = Layer(self.shape, self.config, self.backend, dtypes, self.space.learned)
        other.offset, other._exact = self.offset, self._exact.copy()
        other.placed = self.placed
        other.narrowed, other._narrowed_at = self.narrowed, self._narrowed_at
        other.kind = self.kind
        other.dtype, other.space = self.dtype, self.space
        other._fitted, other._seen = self._fitted, self._seen.copy()
        other.body = self.body.copy() if self.body else None
        other.observations = self.observations.copy() if self.observations else None
        return other

    # What a policy has to know.

    @property
    def observed(self) -> bool:
        """Whether queries are known; a layer without them keeps every token."""
        return self.observations is not None and self.observations.nbytes > 0

    @property
    def exact_positions(self) -> NDArray[np.int32]:
        """Positions of the exact rows, int32 [E]."""
        window = np.arange(self.offset - self.recent, self.offset)
        return np.concatenate([np.arange(self.sinks), window]).astype(np.int32)

    # Bytes.

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in an uncompressed fp16 cache."""
        return 2 * self.offset * self.shape.heads * (self.shape.k_dim + self.shape.v_dim)

    @property
    def fixed_nbytes(self) -> int:
        """Bytes that no policy drops: sink tokens, a window at its fullest, queries, centers."""
        return self._most_exact_nbytes + self.memory().centers + self._queries_nbytes

    @property
    def least_nbytes(self) -> int:
        """The same, once the prompt is in and queries come a few at a time."""
        queries = self.observations.usual_nbytes if self.observations else 0
        return self._most_exact_nbytes + self.memory().centers + queries

    @property
    def growth_nbytes(self) -> int:
        """Bytes by which the observed queries may still grow."""
        return self.observations.most_nbytes - self._queries_nbytes if self.observations else 0

    @property
    def most_nbytes(self) -> int:
        """Bytes allocated once window and queries are at their fullest, with no further block."""
        memory = self.memory()
        return memory.allocated - memory.exact + self._most_exact_nbytes + self.growth_nbytes

    def memory(self) -> CacheMemory:
        """Bytes, counted from the buffers."""
        exact, queries = sum(x.nbytes for x in self.exact_arrays), self._queries_nbytes
        of_body = self.body.centers if self.body else ()
        centers = sum(x.nbytes for x in (*of_body, *self.space.arrays))
        body = self.body.memory() if self.body else CacheMemory()
        return body + CacheMemory(
            side=queries, exact=exact, centers=centers, allocated=exact + queries + centers
        )

    @property
    def row_nbytes(self) -> int:
        """Bytes of an exact token."""
        return sum(x.shape[0] * x.shape[2] * x.dtype.size for x in self.tail)

    @property
    def _most_exact_nbytes(self) -> int:
        rows = self.config.sink_tokens + self.config.window + TILE
        return self.row_nbytes * rows

    @property
    def _queries_nbytes(self) -> int:
        return self.observations.nbytes if self.observations else 0

    # Storing it.

    @property
    def state(self) -> LayerState:
        """Everything that `restored` needs."""
        shape, body = self.shape, None
        if self.body is not None:
            body = BodyState(self.body.centers, self.body.state, self.space.scales)
        sizes = shape.heads, shape.k_dim, shape.v_dim
        return LayerState(self.offset, *sizes, self.exact, body, self.narrowed)

    @classmethod
    def restored(
        cls,
        state: LayerState,
        config: CompressionConfig,
        backend: Backend,
        learned: Learned | None = None,
    ) -> Layer:
        """The layer that `state` came from.

        Raises:
            ConfigError: what was learned is for another shape.
        """
        shape = Shape(state.heads, state.k_dim, state.v_dim)
        dtypes = state.exact.k.dtype, state.exact.v.dtype
        layer = cls(shape, config, backend, dtypes, learned)
        layer.offset, layer.exact = state.offset, state.exact
        if state.narrowed:
            layer.narrow()
        if (body := state.body) is not None:
            if body.key_scales is not None:
                layer.space = replace(layer.space, equalizer=Equalizer(body.key_scales))
            layer.body = layer._new_body(body.centers)
            layer.body.restore(body.tiers)
            chosen = layer.body.lost and config.policy.drops  # a file does not say when
            layer.placed = state.offset if chosen else 0
        return layer

    def _new_body(self, centers: Centers) -> CompressedBody:
        heads, rounding = self.shape.heads, self.config.rounding
        shares = self._narrow if self.narrowed else self._whole
        return CompressedBody(
            heads, shares, centers, self.sinks, rounding, self.backend, self.space.shaping
        )

    def _equalize(self, start: int, stop: int) -> None:
        """Fit the equalizer on the first of the exact rows start..stop, and apply it to all."""
        squares = self._seen.mean_squares()
        self._seen, self._fitted = SeenQueries(), squares is not None
        fitted = slice(start, min(stop, start + CENTER_TOKENS))
        self.space, self.exact = equalized(self.space, self.exact, fitted, squares)


@lru_cache(maxsize=64)
def _kind(*parts: object) -> tuple[object, ...]:
    """The parts, the same object for equal ones: then they are soon compared."""
    return parts
