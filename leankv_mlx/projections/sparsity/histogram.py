"""How large the channels of an input are: a histogram of bounded size, and thresholds from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 10_000
TAIL = 0.01
"""Share of the first sizes that lies above the bins (TEAL, arXiv 2408.14690, has both numbers)."""


class Histogram:
    """Of sizes, which are at least 0. Its memory does not grow with their number.

    The first sizes say where the bins end. Those above the end are counted only: a few tokens have
    channels a thousand times larger than all others, and no threshold lies there.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(BINS + 1, np.int64)  # the last one is of what lies above
        self._end = 0.0

    def add(self, sizes: NDArray[np.float32]) -> None:
        """Count sizes of any shape; those that are no numbers count as large."""
        flat = sizes.reshape(-1)
        if not self._end:
            self._end = _end(flat)
            if not self._end:  # nothing but zeros
                self._counts[0] += flat.size
                return
        place = np.fmin(flat * (BINS / self._end), BINS)
        self._counts += np.bincount(place.astype(np.int32), minlength=BINS + 1)

    def threshold(self, share: float) -> float:
        """What so large a share of the sizes does not exceed: exact to the width of a bin, and at
        most the end of the bins."""
        below = np.cumsum(self._counts)
        wanted = share * below[-1]
        if not wanted or not self._end:
            return 0.0
        place = int(np.searchsorted(below, wanted))
        if place == BINS:
            return self._end
        inside = (wanted - (below[place] - self._counts[place])) / self._counts[place]
        return float((place + inside) * self._end / BINS)


def _end(sizes: NDArray[np.float32]) -> float:
    """Above all but TAIL of the sizes, and above some."""
    finite = sizes[np.isfinite(sizes)]
    if not finite.size:
        return 0.0
    end = float(np.quantile(finite, 1 - TAIL))
    return end or float(finite.max())
