"""Cubic codebooks: level(code) = x * (a + b * x * x), x = code - (2^B - 1) / 2.

Levels are in units of the vector's scale. They were fitted to N(0, 1), whose Lloyd-Max codebook
they approach to 0.1 dB (TurboQuant, arXiv 2504.19874, quantizes rotated vectors so). A kernel may
compute a level, look it up or shuffle it; all agree.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

CUBIC: dict[int, tuple[float, float]] = {
    2: (0.8914833, 0.04896949),
    3: (0.4720540, 0.01151046),
    4: (0.2401280, 0.002102614),
    8: (0.015811765, 1.0537124e-6),
}


@lru_cache
def levels(bits: int) -> np.ndarray:
    """All levels in code order, float32 [2^bits]."""
    a, b = (np.float32(c) for c in CUBIC[bits])
    x = np.arange(2**bits, dtype=np.float32) - np.float32((2**bits - 1) / 2)
    return np.asarray(x * (a + b * x * x))


@lru_cache
def thresholds(bits: int) -> np.ndarray:
    """Midpoints between neighbouring levels, float32 [2^bits - 1]."""
    values = levels(bits)
    return np.asarray((values[1:] + values[:-1]) * np.float32(0.5))


def level(codes: mx.array, bits: int) -> mx.array:
    """codes: uint32, any shape -> float32 levels."""
    a, b = CUBIC[bits]
    x: mx.array = codes.astype(mx.float32) - (2**bits - 1) / 2
    return x * (a + b * x * x)


def nearest(x: mx.array, bits: int) -> mx.array:
    """x: float32, any shape, in units of the scale -> uint32 codes of the nearest levels.

    A value exactly between two levels takes the lower one.
    """
    if bits == 8:
        return mx.searchsorted(mx.array(thresholds(8)), x).astype(mx.uint32)
    codes = mx.zeros(x.shape, mx.uint8)
    for middle in thresholds(bits):
        codes = codes + (x > float(middle))
    return codes.astype(mx.uint32)
