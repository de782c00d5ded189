"""What a `BatchedKVCache` hands out: arrays that stand for a layer of several sequences, and the
attention that reads the layers instead; and the masks that say no more than the causal rule."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from leankv_mlx.cache.fetch import Arrays, Fetch, Withheld, hand_out
from leankv_mlx.cache.together import attend_all
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Mask


@dataclass(eq=False)
class BatchFetch:
    """All tokens of a layer of several sequences at one moment, see `Fetch`.

    Attributes:
        fetches: of each row; None where nothing but padding came.
        spans: which columns of the update are its tokens, start and stop.
        begin: columns before them, the most tokens that a row had.
        columns: of the update.
    """

    fetches: list[Fetch | None]
    spans: list[tuple[int, int]]
    begin: int
    columns: int

    def arrays(self) -> Arrays:
        """Keys and values of all tokens, [B, H, N, head_dim], padded on the left where sequences
        are shorter and as the columns that came were; remembered until the keys die. `Withheld`
        once a policy has dropped tokens of one."""
        return hand_out(self._withheld() or self._decoded(), self)

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
            DroppedTokensError: an array as mask although a policy has dropped tokens.
        """
        if isinstance(mask, mx.array) and is_causal(mask):
            mask = "causal"
        fetches = [fetch for fetch in self.fetches if fetch is not None]
        whole = all(span in ((0, queries.shape[2]), (0, 0)) for span in self.spans)
        if len(fetches) == len(self.spans) and whole and not isinstance(mask, mx.array):
            together = attend_all(fetches, queries, scale, mask, sink_logits)
            if together is not None:
                return together
        out: list[mx.array | None] = []
        for i, fetch in enumerate(self.fetches):
            start, stop = self.spans[i] if self.columns else (0, queries.shape[2])
            if fetch is None:
                out.append(None)
                continue
            found = fetch.attend(
                queries[i : i + 1, :, start:stop],
                scale=scale,
                mask=self._mask_of(i, mask, start, stop),
                sink_logits=sink_logits,
            )
            if fetch.tokens > MAX_DECODE_TOKENS:
                mx.eval(found)  # one working copy at a time
                self.fetches[i] = None
            padding = [(0, 0), (0, 0), (start, queries.shape[2] - stop), (0, 0)]
            out.append(found if (start, stop) == (0, queries.shape[2]) else mx.pad(found, padding))
        shape = next((x.shape for x in out if x is not None), (1, *queries.shape[1:]))
        none = mx.zeros(shape, queries.dtype)
        return mx.concatenate([none if x is None else x for x in out])

    def _mask_of(self, row: int, mask: Mask, start: int, stop: int) -> Mask:
        """The part of an array over all columns that is about the tokens of one row."""
        if not isinstance(mask, mx.array):
            return mask
        fetch = self.fetches[row]
        assert fetch is not None
        mine = (
            mask[row]
            if mask.ndim == 4 and mask.shape[0] > 1
            else mask[0]
            if mask.ndim == 4
            else mask
        )
        end = self.begin + stop
        return mine[..., start:stop, end - fetch.end : end]

    def _withheld(self) -> tuple[Any, Any] | None:
        for fetch in self.fetches:
            if fetch is not None and fetch.layer.ragged:
                shape, width = fetch.layer.shape, self.begin + self.columns
                keys, values = (
                    Withheld((len(self.fetches), shape.heads, width, dim), fetch.layer.dtype)
                    for dim in (shape.k_dim, shape.v_dim)
                )
                return keys, values
        return None

    def _decoded(self) -> Arrays:
        width = self.begin + self.columns
        rows: list[Arrays | None] = []
        for fetch, (_, stop) in zip(self.fetches, self.spans, strict=True):
            if fetch is None:
                rows.append(None)
                continue
            end = self.begin + stop
            padding = [(0, 0), (0, 0), (end - fetch.end, width - end), (0, 0)]
            keys, values = (mx.pad(x, padding) for x in fetch.decoded())
            rows.append((keys, values))
        keys, values = (
            mx.concatenate([_blank(rows, side) if row is None else row[side] for row in rows])
            for side in (0, 1)
        )
        return keys, values


def _blank(rows: Sequence[Any], side: int) -> mx.array:
    """What stands where a row has nothing."""
    return mx.zeros_like(next(row[side] for row in rows if row is not None))


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
