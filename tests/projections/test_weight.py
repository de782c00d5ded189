"""The layout: as it is written down, MLX's numbers, and MLX's arrays back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.errors import ShapeError
from leankv_mlx.projections import relay, restore, rows
from leankv_mlx.projections import weight as layout
from leankv_mlx.projections.weight import BITS, GROUPS, LANES, tile_outputs
from tests.projections.cases import FLOATS

SHAPES = [(1, 128), (64, 128), (130, 256), (192, 384)]


@pytest.fixture(params=["native", "ops"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ops":
        monkeypatch.setattr(layout, "_native", lambda: None)
    elif layout._native() is None:
        pytest.skip("the extension is not here")
    return str(request.param)


def quantized(
    shape: tuple[int, int], group: int, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(bits * group)
    return tuple(mx.quantize(mx.random.normal(shape).astype(dtype), group, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_mlx(
    bits: int, group: int, shape: tuple[int, int], implementation: str
) -> None:
    for dtype in FLOATS:
        given = quantized(shape, group, bits, dtype)
        weight = relay(*given, group, bits)
        for before, after in zip(given, restore(weight), strict=True):
            assert before.dtype == after.dtype and mx.array_equal(before, after)
        ids = mx.array([[0, shape[0] // 2], [shape[0] - 1, 0]])
        expected = mx.dequantize(*(array[ids] for array in given), group, bits)
        found = rows(weight, ids)
        assert found.dtype == expected.dtype and mx.array_equal(found, expected)


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_what_its_description_says(bits: int, implementation: str) -> None:
    given = quantized((150, 64), 32, bits, mx.float32)
    weight = relay(*given, 32, bits)
    ones = mx.ones_like(given[1])
    plain = np.array(mx.dequantize(given[0], ones, mx.zeros_like(ones), 32, bits), np.uint32)
    words, scales = np.array(weight.codes), np.array(weight.scales)
    wide = tile_outputs(bits)
    tiles = -(-150 // wide)
    assert words.shape == (tiles, 64, LANES) and scales.shape == (tiles, 2, wide)
    expected = np.zeros_like(words)
    for n in range(150):
        t, p = divmod(n, wide)
        f, lane = divmod(p, LANES)
        expected[t, :, lane] |= plain[n] << np.uint32(f * bits)
        assert np.array_equal(scales[t, :, p], np.array(given[1])[n])
    assert np.array_equal(words, expected)


def test_a_channel_of_a_tile_is_one_cache_line() -> None:
    if layout._native() is None:
        pytest.skip("the extension is not here")
    for n in (1, 100, 5000):
        weight = relay(*quantized((n, 256), 32, 4, mx.float16), 32, 4)
        mx.eval(weight.codes)
        memory: Any = np.frombuffer(memoryview(weight.codes), np.uint8)  # type: ignore[arg-type]
        assert memory.ctypes.data % 64 == 0


def test_what_is_no_weight_is_refused() -> None:
    codes, scales, biases = quantized((20, 64), 32, 4, mx.float32)
    wrong: list[tuple[mx.array, mx.array, mx.array, int, int]] = [
        (codes, scales, biases, 64, 4),
        (codes, scales, biases, 32, 8),
        (codes, scales, biases, 32, 7),
        (codes, scales, biases, 16, 4),
        (codes[:, :-1], scales, biases, 32, 4),
        (codes[:-1], scales, biases, 32, 4),
        (codes[:0], scales[:0], biases[:0], 32, 4),
        (codes.astype(mx.int32), scales, biases, 32, 4),
        (codes[None], scales[None], biases[None], 32, 4),
        (codes, scales, biases[:, :1], 32, 4),
        (codes, scales, biases.astype(mx.float16), 32, 4),
        (codes, scales.astype(mx.int32), biases.astype(mx.int32), 32, 4),
        (codes, scales[0, 0], biases[0, 0], 32, 4),
    ]
    for given in wrong:
        with pytest.raises(ShapeError, match=r"\[relay\]"):
            relay(*given)
    made = relay(codes, scales, biases, 32, 4)
    for changed in (
        {"outputs": 200},
        {"outputs": 0},
        {"bits": 8},
        {"bits": 7},
        {"group": 64},
        {"codes": made.codes[:, :40]},
        {"codes": made.codes[0]},
        {"codes": made.codes.astype(mx.int32)},
        {"scales": made.scales[:, :1]},
        {"biases": made.biases.astype(mx.bfloat16)},
    ):
        with pytest.raises(ShapeError, match=r"\[Weight\]"):
            replace(made, **changed)
