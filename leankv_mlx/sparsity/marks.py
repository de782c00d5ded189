"""Scores of stored tokens in a byte each: eighths of a power of two."""

import numpy as np
from numpy.typing import NDArray

Marks = NDArray[np.uint8]
Scores = NDArray[np.float32]


def marks_of(scores: Scores) -> Marks:
    """Scores from 0 to 1 to within 5%: 255 is 1, 247 is 1/2, 0 is 0 and whatever is below 2^-31."""
    with np.errstate(divide="ignore"):
        steps = np.rint(255 + 8 * np.log2(scores))
    return np.asarray(np.clip(steps, 0, 255), np.uint8)


_SCORES: Scores = np.exp2((np.arange(256) - 255) / 8).astype(np.float32)
_SCORES[0] = 0
_SCORES.view(np.uint32)[:] &= 0xFFFF0000  # as bfloat16, which is faster to sort


def scores_of(marks: Marks) -> Scores:
    """What the marks stand for."""
    return _SCORES[marks]
