"""Noise shaping: errors go where they cost little, and nothing else changes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from leankv_mlx.codec.quantize import Bits, dequantize, quantize
from leankv_mlx.codec.shaping import FLOOR, shaping
from leankv_mlx.config import Rounding

H, T, D = 2, 64, 64


def metric(spread: float, dim: int = D, seed: int = 0) -> NDArray[np.float64]:
    """Eigenvalues from 1 down to exp(-spread), in random directions, of each head."""
    draw = np.random.default_rng(seed)
    turns = np.linalg.qr(draw.standard_normal((H, dim, dim)))[0]
    return (turns * np.exp(-spread * np.linspace(0, 1, dim))) @ turns.swapaxes(1, 2)


def vectors(dim: int = D, seed: int = 0) -> mx.array:
    return mx.random.normal((H, T, dim), key=mx.random.key(seed))


def errors(
    x: mx.array, bits: Bits, how: mx.array | None, rounding: Rounding
) -> NDArray[np.float64]:
    """[H, T, D]"""
    codes, scales = quantize(x, bits, rounding, how)
    return np.array(x - dequantize(codes, scales, bits), np.float64)


def cost(error: NDArray[np.float64], of: NDArray[np.float64]) -> float:
    return float(np.einsum("htd,hde,hte->", error, of, error))


@pytest.mark.parametrize("rounding", ["search", "rms"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_cost_less(bits: int, rounding: Rounding) -> None:
    """By as much as the geometric mean of the eigenvalues is below their mean, but for what
    channels are moved by."""
    found = metric(4.0)
    x, all_bits = vectors(), (bits, bits)
    plain = errors(x, all_bits, None, rounding)
    moved = errors(x, all_bits, shaping(found), rounding)
    sizes = np.exp(-4.0 * np.linspace(0, 1, D)) + FLOOR * np.trace(found[0]) / D
    possible = np.exp(np.log(sizes).mean()) / sizes.mean()
    assert cost(moved, found) < (1.3 if bits > 2 else 1.6) * possible * cost(plain, found)
    assert cost(moved, np.broadcast_to(np.eye(D), found.shape)) > (plain**2).sum()


@settings(max_examples=20, deadline=None)
@given(
    bits=st.lists(st.sampled_from([0, 2, 3, 4, 8]), min_size=1, max_size=4).filter(any),
    spread=st.floats(0, 12),
    rounding=st.sampled_from(["search", "rms"]),
    seed=st.integers(0, 2**16),
)
def test_what_is_stored_is_as_ever(
    bits: list[int], spread: float, rounding: Rounding, seed: int
) -> None:
    """Codes of these bits, 0 where nothing is stored, scales that are numbers; and keys keep
    products with themselves when scales are searched."""
    dim = 32 * len(bits)
    x = vectors(dim, seed)
    codes, scales = quantize(x, tuple(bits), rounding, shaping(metric(spread, dim, seed)))
    assert (np.array(codes) < np.repeat([max(1, 2**b) for b in bits], 32)).all()
    assert np.isfinite(np.array(scales)).all() and scales.dtype == mx.float16
    if rounding == "search":
        kept = x * mx.array(np.repeat([float(b > 0) for b in bits], 32))
        decoded = dequantize(codes, scales, tuple(bits))
        np.testing.assert_allclose((kept * decoded).sum(-1), (kept * kept).sum(-1), rtol=2e-3)


def test_errors_that_all_cost_the_same_stay_where_they_are() -> None:
    codes, _ = quantize(vectors(), (3, 3), "rms")
    same, _ = quantize(vectors(), (3, 3), "rms", shaping(np.stack([np.eye(D)] * H)))
    assert mx.array_equal(codes, same)


def test_a_vector_of_zeros_stays_one() -> None:
    for rounding in ("search", "rms"):
        error = errors(mx.zeros((H, T, D)), (4, 2), shaping(metric(3.0)), rounding)
        assert not error.any()


def test_a_vector_costs_the_same_alone_and_among_others() -> None:
    x, how = vectors(), shaping(metric(3.0))
    together = errors(x, (3, 3), how, "search")
    np.testing.assert_array_equal(errors(x[:, 7:8], (3, 3), how, "search"), together[:, 7:8])


def test_a_direction_that_costs_nothing_has_bounds() -> None:
    """A metric of one direction only: the others do not take errors without end."""
    one = np.zeros((H, D, D))
    one[:, 0, 0] = 1
    turns = metric(0.0)  # any rotation will do
    error = errors(vectors(), (2, 2), shaping(turns @ one @ turns), "search")
    assert (error**2).mean() < 0.5
