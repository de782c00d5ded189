"""The most recent queries of a layer: what stored tokens are judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

OBSERVED_QUERIES = 64
"""As in LeanKV's code (arXiv 2412.03131): the last 64 queries."""

_PART = 8


@dataclass(frozen=True)
class Observed:
    """Queries that tokens are judged by.

    Attributes:
        queries: in the space of the stored keys, float32 [Hq, R, D].
        positions: where they stand, int32 [R].
        scale: factor of the scores.
        sink_logits: learned logits [Hq], or None.
        lse: log-sum-exp of the scores over everything that a query saw, float32 [Hq, R]; None
            where that is not known of all.
    """

    queries: mx.array
    positions: NDArray[np.int32]
    scale: float
    sink_logits: mx.array | None
    lse: mx.array | None


@dataclass(frozen=True)
class _Entry:
    """Queries [Hq, L, head_dim] as the model made them, and where they stand, ascending, [L]."""

    queries: mx.array
    lse: mx.array | None
    positions: NDArray[np.int64]

    @property
    def length(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int) -> _Entry:
        """Its queries start..stop. A copy: a slice would keep the whole buffer behind it."""
        lse = None if self.lse is None else mx.contiguous(self.lse[:, start:stop])
        queries = mx.contiguous(self.queries[:, start:stop])
        return _Entry(queries, lse, self.positions[start:stop])


class Observations:
    """A ring of the last queries; costs a list entry per decode call until it is asked."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._held = 0  # queries of all entries
        self._scale = 1.0
        self._row_nbytes = 0  # of one query of all heads, with its log-sum-exp
        self._sink_logits: mx.array | None = None

    def add(
        self,
        queries: mx.array,
        lse: mx.array | None,
        end: int,
        scale: float,
        sink_logits: mx.array | None,
    ) -> None:
        """Remember the queries of one call.

        Args:
            queries: [Hq, L, head_dim] as the model made them.
            lse: float32 [Hq, L] if it is known.
            end: tokens in the cache, these included.
            scale, sink_logits: as in `kernels.decode_attention`.
        """
        entry = _Entry(queries, lse, np.arange(end - queries.shape[1], end))
        if entry.length > OBSERVED_QUERIES:
            entry = entry.part(entry.length - OBSERVED_QUERIES, entry.length)
            mx.eval(entry.queries)  # or the queries of the whole prompt stay alive
        self._scale, self._sink_logits = scale, sink_logits
        self._row_nbytes = queries.nbytes // queries.shape[1] + 4 * queries.shape[0]
        self._entries.append(entry)
        self._held += entry.length
        while self._held - self._entries[0].length >= OBSERVED_QUERIES:
            self._held -= self._entries.pop(0).length

    def trim(self, offset: int) -> None:
        """Forget the queries of tokens that stand at `offset` or later."""
        kept = []
        for entry in self._entries:
            stop = int(np.searchsorted(entry.positions, offset))
            if stop:
                kept.append(entry if stop == entry.length else entry.part(0, stop))
        self._keep(kept)

    def latest(self, into_keys: Callable[[mx.array], mx.array]) -> Observed | None:
        """The last queries; None if there are none.

        Args:
            into_keys: takes queries [Hq, R, head_dim], float32, to the space of the stored keys.
        """
        if not self._entries:
            return None
        known = all(entry.lse is not None for entry in self._entries)
        queries = mx.concatenate([entry.queries for entry in self._entries], axis=1)
        lse = (
            mx.concatenate([e.lse for e in self._entries if e.lse is not None], axis=1)
            if known
            else None
        )
        positions = np.concatenate([entry.positions for entry in self._entries])
        surplus = max(0, len(positions) - OBSERVED_QUERIES)
        return Observed(
            into_keys(queries[:, surplus:].astype(mx.float32)),
            positions[surplus:].astype(np.int32),
            self._scale,
            self._sink_logits,
            None if lse is None else lse[:, surplus:],
        )

    def clear(self) -> None:
        """Forget all queries."""
        self._keep([])

    def settle(self, lse: mx.array) -> None:
        """Remember the log-sum-exps [Hq, R] of what `latest` gave."""
        queries = mx.concatenate([entry.queries for entry in self._entries], axis=1)
        # Layers that share a cache ask at the same positions, so those need not be consecutive.
        positions = np.concatenate([entry.positions for entry in self._entries])
        count = lse.shape[1]
        settled = _Entry(queries[:, -count:], lse, positions[-count:])
        # In parts, so that the oldest can go while new ones come.
        starts = range(0, count, _PART)
        self._keep([settled.part(i, min(i + _PART, count)) for i in starts])

    def _keep(self, entries: list[_Entry]) -> None:
        self._entries = entries
        self._held = sum(entry.length for entry in entries)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(e.queries.nbytes + (0 if e.lse is None else e.lse.nbytes) for e in self._entries)

    @property
    def usual_nbytes(self) -> int:
        """Bytes of a full ring of queries that came a few at a time; 0 before any."""
        return (OBSERVED_QUERIES + _PART) * self._row_nbytes

    @property
    def most_nbytes(self) -> int:
        """Bytes of the ring at its fullest, before the longest of its calls goes; 0 before any."""
        longest = max((entry.length for entry in self._entries), default=0)
        return (OBSERVED_QUERIES + max(_PART, longest)) * self._row_nbytes

    def copy(self) -> Observations:
        """Another ring with the same content."""
        other = Observations()
        other._keep(list(self._entries))
        other._scale, other._sink_logits = self._scale, self._sink_logits
        other._row_nbytes = self._row_nbytes
        return other
