"""Which inputs leave out how much, so that all of them together leave out a given share.

What leaving out costs is known for every input at `LEVELS`. Steps are bought one after the other,
each where a byte costs least, as in TEAL's greedy optimization (arXiv 2408.14690).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.settings import MOST_SPARSE

STEP = 0.05

Floats = NDArray[np.float64]
LEVELS: Floats = np.linspace(0, MOST_SPARSE, round(MOST_SPARSE / STEP) + 1)
"""Shares of an input's channels that are left out."""


def allocated(costs: Floats, sizes: Floats, share: float) -> Floats:
    """The share of its channels that every input leaves out, [n].

    Args:
        costs: [n, len(LEVELS)], what each input costs at each level; they add up.
        sizes: bytes of the weights behind each input, [n].
        share: of all bytes, at most MOST_SPARSE. It is met exactly: the last step is cut.
    """
    prices = np.maximum.accumulate(costs, axis=1)  # leaving out more is never cheaper
    at = np.zeros(len(sizes), np.int64)
    shares = np.zeros(len(sizes))
    left = share * sizes.sum()
    while left > 1e-9 * sizes.sum():
        i, level = _cheapest(prices, sizes, at)
        step = LEVELS[level] - shares[i]
        taken = min(step * sizes[i], left)
        shares[i] += taken / sizes[i]
        at[i], left = level, left - taken
    return shares


def _cheapest(prices: Floats, sizes: Floats, at: NDArray[np.int64]) -> tuple[int, int]:
    """The input and the level to raise it to that cost least for a byte; steps over several levels
    count, too, because costs need not be convex."""
    best, where = np.inf, (-1, -1)
    for i, now in enumerate(at):
        saved = (LEVELS[now + 1 :] - LEVELS[now]) * sizes[i]
        if not saved.size:
            continue
        each = (prices[i, now + 1 :] - prices[i, now]) / saved
        k = int(each.argmin())
        if each[k] < best:
            best, where = float(each[k]), (i, int(now) + 1 + k)
    return where
