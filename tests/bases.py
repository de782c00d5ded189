"""Bases that nothing was learned for. Import as `from tests.bases`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.basis import Basis


def matrix(dim: int, condition: float, seed: int) -> NDArray[np.float32]:
    """Of about this condition number and of mean size 1, of numbers that float16 has."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((dim, dim)))[0] for _ in range(2))
    sizes = np.geomspace(1, 1 / condition, dim)
    scaled = left * (sizes / np.sqrt(np.square(sizes).mean())) @ right
    return scaled.astype(np.float16).astype(np.float32)


def basis(heads: int, dim: int, condition: float = 30.0, seed: int = 0) -> Basis:
    """Of some layer."""
    matrices = [matrix(dim, condition, 100 * seed + head) for head in range(heads)]
    return Basis(np.stack(matrices), costs(heads, dim, seed))


def costs(heads: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """A few directions that cost much, and most that cost little."""
    draw = np.random.default_rng(seed)
    drawn = np.exp(1.5 * draw.standard_normal((heads, dim)))
    return drawn.astype(np.float16).astype(np.float32)
