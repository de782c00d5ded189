"""The layout: MLX's numbers, and MLX's arrays back bit for bit."""

import mlx.core as mx
import pytest

from leankv_mlx.projections import project, relay, restore, rows

SHAPES = [(64, 128), (100, 256), (192, 384)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_mlx(bits: int, group: int, shape: tuple[int, int]) -> None:
    mx.random.seed(bits * group)
    given = mx.quantize(mx.random.normal(shape), group, bits)
    weight = relay(*given, group, bits)

    for before, after in zip(given, restore(weight), strict=True):
        assert mx.array_equal(before, after)

    ids = mx.array([[0, 5], [shape[0] - 1, 63]])
    assert mx.array_equal(
        rows(weight, ids), mx.dequantize(*(array[ids] for array in given), group, bits)
    )

    x = mx.random.normal((3, shape[1]))
    expected = mx.quantized_matmul(x, *given, transpose=True, group_size=group, bits=bits)
    (out,) = project(x, [weight]).outs
    assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()
