"""What a `BatchedKVCache` hands out: arrays that stand for a layer of several sequences, and the
attention that reads the layers instead; and the masks that say no more than the causal rule."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from leankv_mlx.cache.fetch import Arrays, Fetch, Withheld, hand_out
from leankv_mlx.cache.shape import Shape
from leankv_mlx.cache.together import attend_all
from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Mask


@dataclass(frozen=True)
class Columns:
    """Where the tokens of sequences of other lengths are in arrays of one width: they end together,
    but for padding on the right in an update.

    Attributes:
        spans: which columns of the update are tokens of each row, start and stop.
        begin: columns before the update, the most tokens that a row had.
        count: columns of the update; 0 if there was none.
    """

    spans: Sequence[tuple[int, int]]
    begin: int
    count: int

    @property
    def width(self) -> int:
        """All columns."""
        return self.begin + self.count

    def of(self, row: int, queries: int) -> tuple[int, int]:
        """Which of so many queries are tokens of a row."""
        return self.spans[row] if self.count else (0, queries)


@dataclass(eq=False)
class BatchFetch:
    """All tokens of a layer of several sequences at one moment, see `Fetch`.

    Attributes:
        fetches: of each row; None where nothing but padding came.
        columns: where their tokens are.
        shape: of every token.
        dtype: of what is decoded.
    """

    fetches: Sequence[Fetch | None]
    columns: Columns
    shape: Shape
    dtype: mx.Dtype

    def arrays(self) -> Arrays:
        """Keys and values of all tokens, [B, H, N, head_dim], padded on the left where sequences
        are shorter and as the columns that came were; remembered until the keys die. `Withheld`
        once heads of one lack tokens, or are stored apart."""
        ragged = any(fetch is not None and fetch.layer.ragged for fetch in self.fetches)
        return hand_out(self._withheld() if ragged else self._decoded(), self)

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """queries: [B, Hq, L, head_dim] -> [B, Hq, L, v_head_dim]; 0 where they are padding.

        Raises:
            DroppedTokensError: an array as mask although heads lack tokens, or are stored apart.
        """
        if isinstance(mask, mx.array) and is_causal(mask):
            mask = "causal"
        rows, length = len(self.fetches), queries.shape[2]
        spans = [self.columns.of(row, length) for row in range(rows)]
        fetches = [fetch for fetch in self.fetches if fetch is not None]
        whole = len(fetches) == rows and all(span == (0, length) for span in spans)
        if whole and not isinstance(mask, mx.array):
            together = attend_all(fetches, queries, scale, mask, sink_logits)
            if together is not None:
                return together
        out = []
        for row, (fetch, (start, stop)) in enumerate(zip(self.fetches, spans, strict=True)):
            if fetch is None or start == stop:
                out.append(mx.zeros((1, *queries.shape[1:3], self.shape.v_dim), queries.dtype))
                continue
            found = fetch.attend(
                queries[row : row + 1, :, start:stop],
                scale=scale,
                mask=self._mask_of(row, fetch, mask, start, stop),
                sink_logits=sink_logits,
            )
            if fetch.tokens > MAX_DECODE_TOKENS:
                mx.eval(found)  # one working copy at a time
            out.append(_padded(found, start, length - stop))
        return mx.concatenate(out)

    def _mask_of(self, row: int, fetch: Fetch, mask: Mask, start: int, stop: int) -> Mask:
        """The part of a mask over all columns that is about the tokens of one row."""
        if not isinstance(mask, mx.array):
            return mask
        if fetch.layer.ragged:
            raise DroppedTokensError
        if mask.ndim == 4:  # [B or 1, 1 or Hq, L, N]
            mask = mask[min(row, mask.shape[0] - 1)]
        end = self._end(row)
        return mask[..., start:stop, end - fetch.end : end]

    def _end(self, row: int) -> int:
        """The column behind the last token of a row."""
        return self.columns.begin + self.columns.spans[row][1]

    def _withheld(self) -> Arrays:
        keys, values = (Withheld(shape, self.dtype) for shape in self._shapes(len(self.fetches)))
        return cast(mx.array, keys), cast(mx.array, values)

    def _decoded(self) -> Arrays:
        rows = []
        for row, fetch in enumerate(self.fetches):
            if fetch is None:
                rows.append([mx.zeros(shape, self.dtype) for shape in self._shapes(1)])
                continue
            end = self._end(row)
            padding = end - fetch.end, self.columns.width - end
            rows.append([_padded(x, *padding) for x in fetch.decoded()])
        keys, values = (mx.concatenate([row[side] for row in rows]) for side in (0, 1))
        return keys, values

    def _shapes(self, rows: int) -> list[tuple[int, int, int, int]]:
        """Of the arrays of keys and values."""
        dims = self.shape.k_dim, self.shape.v_dim
        return [(rows, self.shape.heads, self.columns.width, dim) for dim in dims]


def _padded(x: mx.array, before: int, behind: int) -> mx.array:
    """[B, H, T, D] -> [B, H, before + T + behind, D]."""
    return mx.pad(x, [(0, 0), (0, 0), (before, behind), (0, 0)]) if before or behind else x


_CAUSAL: dict[int, weakref.ref[mx.array]] = {}


def remember_causal(mask: mx.array) -> None:
    """This array says no more than the causal rule, by row."""
    name = id(mask)

    def forget(_: weakref.ref[mx.array]) -> None:
        _CAUSAL.pop(name, None)

    _CAUSAL[name] = weakref.ref(mask, forget)


def is_causal(mask: mx.array) -> bool:
    """Whether `BatchedKVCache.make_mask` made this very array of the causal rule alone."""
    found = _CAUSAL.get(id(mask))
    return found is not None and found() is mask
