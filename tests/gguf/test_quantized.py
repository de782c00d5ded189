"""Types of GGUF as MLX's triples: the numbers of both libraries are the same, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from leankv_mlx.models.container import FlawError
from leankv_mlx.models.quantized import (
    AFFINE,
    AGAIN_BITS,
    GROUP,
    bits_of,
    check_readable,
    dequantize,
    pack,
    scales_of,
    triple,
)
from tests.gguf.files import blocks, encoded

ROWS, COLUMNS = 24, 768


def rows(kind: str) -> np.ndarray:
    values = np.random.default_rng(3).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    return encoded(values, kind)


def unpacked(kind: str, raw: np.ndarray) -> np.ndarray:
    weight, scales, biases = map(mx.array, triple(raw, kind))
    plain = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), GROUP, bits_of(kind)
    )
    return np.array(plain)


@pytest.mark.parametrize("kind", AFFINE)
def test_exact_types_lose_nothing(kind: str) -> None:
    raw = rows(kind)
    expected = quants.dequantize(raw, GGMLQuantizationType[kind])
    assert np.array_equal(unpacked(kind, raw), expected)
    assert len(np.unique(expected)) > 1000


@pytest.mark.parametrize("kind", AFFINE)
def test_scales_have_the_dtype_that_holds_them(kind: str) -> None:
    found = triple(rows(kind), kind)
    dtype = {"F16": np.float16, "F32": np.float32}[scales_of(kind)]
    assert found.scales.dtype == found.biases.dtype == dtype
    assert found.scales.shape == found.biases.shape == (ROWS, COLUMNS // GROUP)
    assert found.weight.dtype == np.uint32
    assert found.weight.shape == (ROWS, COLUMNS * bits_of(kind) // 32)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q6_K", "IQ4_XS"])
def test_other_types_err_by_a_step_of_their_group(kind: str) -> None:
    raw = blocks(kind, (ROWS, COLUMNS))
    expected = quants.dequantize(raw, GGMLQuantizationType[kind])
    groups = expected.reshape(ROWS, -1, GROUP)
    step = (groups.max(-1) - groups.min(-1)) / (2**AGAIN_BITS - 1)
    error = np.abs(unpacked(kind, raw) - expected).reshape(groups.shape)
    # MLX moves the grid so that the value farthest from 0 is on it; the other end then is off it.
    assert (error <= 1.01 * step[..., None]).all()
    assert np.sqrt((error**2).mean()) < 0.4 * np.sqrt((step**2).mean())
    assert error.max() > 0


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_levels_are_packed_as_mlx_packs_them(bits: int) -> None:
    levels = np.random.default_rng(bits).integers(0, 2**bits, (50, GROUP), np.uint8)
    ones, zeros = mx.ones((50, 1)), mx.zeros((50, 1))
    found = mx.dequantize(mx.array(pack(levels, bits)), ones, zeros, GROUP, bits)
    assert np.array_equal(np.array(found), levels)


def test_a_type_that_nothing_reads() -> None:
    with pytest.raises(FlawError, match="type Q8_K, which cannot be read"):
        check_readable("Q8_K")
    for kind in (*AFFINE, "Q6_K", "IQ1_S", "MXFP4"):
        check_readable(kind)


def test_scales_without_room_for_their_biases() -> None:
    """8 times the largest float16 is infinite in float16."""
    raw = np.zeros((1, 18), np.uint8)
    raw[:, :2] = np.array([60000], "<f2").view(np.uint8)
    assert np.isfinite(dequantize(raw, "Q4_0")).all()
    with pytest.raises(FlawError, match="no numbers"):
        triple(raw, "Q4_0")
