"""Scores of neighbourhoods instead of single tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int32]
Scores = NDArray[np.float32]


def pooled(scores: Scores, positions: Positions, width: int) -> Scores:
    """The largest score among tokens at most width // 2 positions away, [H, S].

    Slots may stand in any order and have gaps between their positions; empty ones (-1) score 0.
    What is no number, because a query overflowed, says nothing and counts as 1, the most there is.
    """
    used = positions >= 0
    scores = np.where(np.isfinite(scores), scores, np.float32(1))
    if width <= 1 or not used.any():
        return np.where(used, scores, 0).astype(np.float32)
    heads, half = len(scores), width // 2
    column, columns = _without_gaps(positions, half)
    in_columns = np.zeros((heads, columns + 2 * half + 1), np.float32)
    # Empty slots write to the spare column at the end.
    target = np.where(used, column + half, columns + 2 * half)
    np.put_along_axis(in_columns, target, np.where(used, scores, 0), axis=1)
    best = _running_max(in_columns[:, :-1], 2 * half + 1)
    picked = np.take_along_axis(best, column, axis=1)
    return np.where(used, picked, 0).astype(np.float32)


def _without_gaps(positions: Positions, reach: int) -> tuple[Positions, int]:
    """Columns for positions [H, S], and their number: equally far apart up to `reach`, but with
    gaps cut to reach + 1, because sink tokens and window may be very far from each other."""
    present = np.zeros(int(positions.max()) + 1, np.bool_)
    present[positions[positions >= 0]] = True
    at = np.flatnonzero(present)
    column = np.zeros(len(present), np.int32)
    column[at] = np.cumsum(np.minimum(np.diff(at, prepend=at[0]), reach + 1))
    return column[positions], int(column[at[-1]]) + 1


def _running_max(x: Scores, width: int) -> Scores:
    """The largest of each `width` neighbours, [H, n - width + 1], by doubling."""
    length, have = x.shape[1] - width + 1, 1
    while have < width:
        step = min(have, width - have)
        x = np.maximum(x[:, :-step], x[:, step:])
        have += step
    return x[:, :length]
