"""`BatchedKVCache`: one layer of several sequences behind the protocol of mlx-lm's batches.

A row is a sequence's own cache, so its blocks, policy, phase, trims and files are what they are
alone, and the batch verbs pick and join rows without touching a code. What is done for all rows at
once is what costs: the append and the attention of a decode step are one operation each.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx

from leankv_mlx.cache.batch_fetch import BatchFetch, Columns, remember_causal
from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.fetch import Arrays, Fetch
from leankv_mlx.cache.memory import shared_nbytes
from leankv_mlx.cache.shape import Shape
from leankv_mlx.cache.stage import Stage
from leankv_mlx.cache.together import append_all
from leankv_mlx.errors import ShapeError, UnsupportedError
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Mask


class BatchedKVCache(Stage):
    """One layer of several sequences.

    Padding is never stored: `prepare` says how much of what comes next is none of a row's tokens.

    Args:
        rows: the same layer of each sequence.
    """

    def __init__(self, rows: Iterable[CompressedKVCache]) -> None:
        self.rows = list(rows)
        self._left = [0] * len(self.rows)  # columns of padding in front of what comes, by row
        self._right = [math.inf] * len(self.rows)  # columns that come before other padding
        self._columns: Columns | None = None  # of the last update
        self._fetched: tuple[weakref.ref[Any], weakref.ref[Any]] | None = None
        self._held: Arrays | None = None

    # The cache protocol of mlx-lm.

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Arrays:
        """Append tokens and return all of them as lazy arrays, see `CompressedKVCache`.

        Args:
            keys: [B, H, L, k_head_dim], after RoPE.
            values: [B, H, L, v_head_dim].

        Returns:
            Keys and values [B, H, N, head_dim], shorter sequences padded on the left.

        Raises:
            DroppedTokensError, ShapeError, ConfigError: see `CompressedKVCache`.
        """
        return self._handed_out(self.update(keys, values))

    def update(self, keys: mx.array, values: mx.array) -> BatchFetch:
        """Append tokens, for a model whose attention asks the fetch itself.

        Raises:
            DroppedTokensError, ShapeError, ConfigError: see `CompressedKVCache`.
        """
        rows = len(self.rows)
        fits = keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3]
        if not rows or not fits or keys.shape[0] != rows:
            raise ShapeError(
                f"[update_and_fetch] expected keys [{rows}, H, L, D] and values "
                f"[{rows}, H, L, Dv], got {keys.shape} and {values.shape}."
            )
        _, heads, tokens, dim = keys.shape
        self._forget()
        columns = self._columns = self._take(tokens)
        fetches: list[Fetch | None]
        if tokens <= MAX_DECODE_TOKENS and all(span == (0, tokens) for span in columns.spans):
            fetches = [*append_all(self.rows, keys, values)]
        else:
            fetches = [
                row.update(keys[i : i + 1, :, a:b], values[i : i + 1, :, a:b], ahead=False)
                if b > a
                else None
                for i, (row, (a, b)) in enumerate(zip(self.rows, columns.spans, strict=True))
            ]
        return BatchFetch(fetches, columns, Shape(heads, dim, values.shape[3]), keys.dtype)

    def keys_and_values(self) -> Arrays:
        """The arrays of the last `update_and_fetch` while they live, else equal ones.

        Raises:
            UnsupportedError: all sequences are empty.
        """
        if self._fetched is not None:
            keys, values = (fetched() for fetched in self._fetched)
            if keys is not None and values is not None:
                return keys, values
        layers = [None if row.empty() else row.layer for row in self.rows]
        some = next((layer for layer in layers if layer), None)
        if some is None:
            raise UnsupportedError("an empty cache has no tokens to attend to.")
        fetches = [
            row.appended(layer, 0) if layer else None
            for row, layer in zip(self.rows, layers, strict=True)
        ]
        columns = self._columns or Columns([(0, 0)] * len(layers), self.size(), 0)
        return self._handed_out(BatchFetch(fetches, columns, some.shape, some.dtype))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask of the next N tokens over arrays of `update_and_fetch`.

        Sequences of one length need none but the causal rule; with others it is an array
        [B, 1, N, offset + N], which attention that reads the caches never computes.
        """
        begin = self.size()
        padding = [
            begin - offset + left for offset, left in zip(self.offsets, self._left, strict=True)
        ]
        even = not any(padding) and all(map(math.isinf, self._right))
        if even and window_size is None and not return_array:
            return None if N == 1 else "causal"
        columns, queries = mx.arange(begin + N), mx.arange(begin, begin + N)[:, None]
        mask = queries >= columns
        if window_size is not None:
            mask = mask & (queries < columns + window_size)
        mask = mask & (mx.array(padding)[:, None, None, None] <= columns)
        if window_size is None:
            remember_causal(mask)
        return mask

    @property
    def offset(self) -> mx.array:
        """`positions` as int32 [B], which is how mlx-lm's batches tell them."""
        return mx.array(self.positions, mx.int32)

    @property
    def positions(self) -> list[int]:
        """Of the first column that comes, in each sequence: its tokens so far. It is padding where
        that is below 0."""
        return [offset - left for offset, left in zip(self.offsets, self._left, strict=True)]

    @property
    def offsets(self) -> list[int]:
        """Tokens of each sequence so far."""
        return [row.offset for row in self.rows]

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be removed from the end of each."""
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Remove the last n tokens of each; returns how many of the longest."""
        self._forget()
        return max((row.trim(n) for row in self.rows), default=0)

    def size(self) -> int:
        """Tokens of the longest."""
        return max(self.offsets, default=0)

    def empty(self) -> bool:
        """True before the first token of any."""
        return all(row.empty() for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes in use; a block that several rows share counts once."""
        bodies = [row.layer.body for row in self.rows if row.layer and row.layer.body]
        return sum(row.nbytes for row in self.rows) - shared_nbytes(
            table for body in bodies for table in body.tables
        )

    @property
    def state(self) -> list[Any]:
        """The arrays, to be evaluated; a batch is no file: `extract` what is to be stored."""
        return [row.layer.state for row in self.rows if row.layer is not None]

    # Batches.

    @classmethod
    def merge(cls, caches: Iterable[CompressedKVCache]) -> BatchedKVCache:
        """A batch of copies of the caches, one of each sequence; they share blocks."""
        caches = list(caches)
        # The same one may be the beginning of several rows.
        return cls([cache.fork(caches[:i].count(cache)) for i, cache in enumerate(caches)])

    def extend(self, other: BatchedKVCache) -> None:
        """Copies of another batch's rows come behind these."""
        self._forget()
        self.rows = [*self.rows, *(row.fork() for row in other.rows)]
        self._left, self._right = [*self._left, *other._left], [*self._right, *other._right]

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order."""
        self._forget()
        if isinstance(batch_indices, mx.array):
            batch_indices = batch_indices.tolist()  # type: ignore[assignment]
        kept = [self.rows[i] for i in batch_indices]
        # One that is kept twice goes on as two.
        before = [kept[:i].count(row) for i, row in enumerate(kept)]
        self.rows = [row.fork(n) if n else row for row, n in zip(kept, before, strict=True)]
        self._left = [self._left[i] for i in batch_indices]
        self._right = [self._right[i] for i in batch_indices]

    def extract(self, idx: int) -> CompressedKVCache:
        """A copy of a row, which shares its blocks."""
        return self.rows[idx].fork()

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """What comes next is padded: on the left by so many columns, or on the right behind
        `lengths` of them, until `finalize`.

        Raises:
            UnsupportedError: padding on the left in front of a sequence that has begun, or on the
                right without `lengths`.
        """
        if left_padding is not None and any(left_padding):
            if not self.empty():
                raise UnsupportedError("left padding can only be added to an empty cache.")
            self._left = [x + int(y) for x, y in zip(self._left, left_padding, strict=True)]
        if right_padding is not None and any(right_padding):
            if lengths is None or len(lengths) != len(self.rows):
                raise UnsupportedError("padding on the right needs the lengths of all rows.")
            self._right = [int(x) for x in lengths]

    def finalize(self) -> None:
        """Nothing of what comes is padding any more."""
        self._columns = None
        self._left, self._right = [0] * len(self.rows), [math.inf] * len(self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchedKVCache:
        """An independent copy that shares the blocks."""
        other = BatchedKVCache(deepcopy(self.rows, memo))
        other._left, other._right = self._left, self._right  # replaced, never changed
        memo[id(self)] = other
        return other

    @property
    def caches(self) -> list[CompressedKVCache]:
        """Its rows, for whoever walks a cache list."""
        return self.rows

    def _take(self, tokens: int) -> Columns:
        """Where the tokens of each row are among the next columns."""
        begin, spans = self.size(), []
        for left, right in zip(self._left, self._right, strict=True):
            start = min(left, tokens)
            spans.append((start, max(start, int(min(right, tokens)))))
        self._left = [max(0, left - tokens) for left in self._left]
        self._right = [max(0, right - tokens) for right in self._right]
        return Columns(spans, begin, tokens)

    def _forget(self) -> None:
        """What was handed out is no longer what there is."""
        self._fetched = self._held = self._columns = None

    def _handed_out(self, fetch: BatchFetch) -> Arrays:
        keys, values = fetch.arrays()
        self._fetched = weakref.ref(keys), weakref.ref(values)
        if any(row.keep_fetched for row in self.rows):
            self._held = keys, values
        return keys, values


CompressedKVCache.merge = BatchedKVCache.merge
