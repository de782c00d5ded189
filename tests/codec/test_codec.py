"""Rotation, codebooks, scales and packing, against NumPy and the specification."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv_mlx.codec import codebook, packing, quantize, rotation
from leankv_mlx.codec.format import Format
from leankv_mlx.config import Rounding
from leankv_mlx.errors import ConfigError
from tests import oracle

BITS = [2, 3, 4, 8]
OF_ONE_SCALE: tuple[Rounding, ...] = ("optimal", "rms")


def gaussian(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def decoded(x: mx.array, bits: tuple[int, ...], rounding: str) -> mx.array:
    return quantize.dequantize(*quantize.quantize(x, bits, rounding), bits)  # type: ignore[arg-type]


def off_direction(x: mx.array, bits: tuple[int, ...], rounding: str) -> float:
    """Squared error of the codes at the scale that suits them best."""
    y = decoded(x, bits, rounding)
    return float((1 - (x * y).sum(-1) ** 2 / (x * x).sum(-1) / (y * y).sum(-1)).mean())


def relative_error(x: mx.array, bits: tuple[int, ...], rounding: str) -> float:
    codes, scales = quantize.quantize(x, bits, rounding)  # type: ignore[arg-type]
    y = quantize.dequantize(codes, scales, bits)
    return float(((x - y) ** 2).sum() / (x * x).sum())


# Rotation


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_rotation_is_the_matrix_of_the_specification(head_dim: int) -> None:
    x = gaussian(5, head_dim)
    r = rotation.hadamard(head_dim)
    expected = np.array(x, np.float64) @ oracle.rotation(head_dim).T
    assert r.dim == -(-head_dim // 32) * 32
    np.testing.assert_allclose(np.array(r.apply(x)), expected, atol=3e-6)
    np.testing.assert_allclose(np.array(r.undo(r.apply(x))), np.array(x), atol=3e-6)


def test_rotation_keeps_scores_and_dtype() -> None:
    q, k = gaussian(3, 80), gaussian(7, 80, seed=1)
    r = rotation.hadamard(80)
    np.testing.assert_allclose(np.array(r.apply(q) @ r.apply(k).T), np.array(q @ k.T), atol=2e-5)
    assert r.apply(q.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_rotation_spreads_a_constant_and_a_single_channel() -> None:
    r = rotation.hadamard(128)
    for x in (mx.ones((128,)), mx.zeros((128,)).at[5].add(1.0)):
        y = mx.abs(r.apply(x))
        assert float(y.max()) < 6 * float(mx.sqrt((y * y).mean()))


def test_the_signs_never_change() -> None:
    # They are part of every stored cache: a change makes old files decode to noise.
    digest = hashlib.sha256(rotation.signs(256).tobytes()).hexdigest()
    assert digest[:16] == "b98d126b1adc28ef"
    assert (rotation.signs(64) == rotation.signs(256)[:64]).all()


# Codebooks


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.11749), (3, 0.03462), (4, 0.00969),
                                                  (8, 5.1e-5)])  # fmt: skip
def test_distortion_at_unit_scale(bits: int, distortion: float) -> None:
    x = gaussian(1_000_000)
    error = (x - codebook.level(codebook.nearest(x, bits), bits)) ** 2
    # The table gives D at 8 bits with two digits; the others hold to 1%.
    assert float(error.mean()) == pytest.approx(distortion, rel=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_nearest_is_the_nearest_level(bits: int) -> None:
    x = np.linspace(-5, 5, 4001, dtype=np.float32)
    codes = np.array(codebook.nearest(mx.array(x), bits))
    distances = np.abs(x[:, None] - codebook.levels(bits))
    chosen = np.take_along_axis(distances, codes[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(chosen, distances.min(1), atol=1e-6)
    np.testing.assert_allclose(codebook.levels(bits), oracle.levels(bits), rtol=1e-6, atol=1e-7)


# Scales


@pytest.mark.parametrize("dim", [64, 128])
def test_scale_search_takes_a_tenth_off_the_error_of_rms(dim: int) -> None:
    x, bits = gaussian(4000, dim), (4,) * (dim // 32)
    assert relative_error(x, bits, "search") < 0.9 * relative_error(x, bits, "rms")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_optimal_rounding_lies_between_rms_and_search(bits: int) -> None:
    x = gaussian(400, 64)
    errors = [off_direction(x, (bits,) * 2, r) for r in ("search", "optimal", "rms")]
    assert errors[1] < errors[2] and errors[0] < 1.01 * errors[1]
    codes, start = (np.array(quantize.quantize(x, (bits,) * 2, r)[0], int) for r in OF_ONE_SCALE)
    assert (codes > start).mean() > 0.01 and (codes < start).mean() > 0.01  # it goes both ways


@pytest.mark.parametrize("bits", BITS)
def test_search_keeps_the_product_of_a_vector_with_itself(bits: int) -> None:
    """Otherwise every score and output is a little too small."""
    x = gaussian(400, 64)
    y = decoded(x, (bits,) * 2, "search")
    np.testing.assert_allclose((x * y).sum(-1), (x * x).sum(-1), rtol=1e-3)  # of an fp16 scale


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_search_agrees_with_numpy(bits: int, dim: int) -> None:
    x = gaussian(300, dim, seed=bits)
    codes, scales = quantize.quantize(x, (bits,) * (dim // 32), "search")
    expected, expected_scales = oracle.encode(np.array(x, np.float64), bits)
    # Two factors can be equally good to the last bit of a float (at 8 bits they often are), so
    # scales may differ now and then.
    same = np.array(scales) == expected_scales
    assert same.mean() > (0.9 if bits == 8 else 0.98)
    assert (np.array(codes) == expected)[same].mean() > 0.999
    y = quantize.dequantize(codes, scales, (bits,) * (dim // 32))
    decoded = oracle.decode(np.array(codes), np.array(scales), bits)
    np.testing.assert_allclose(np.array(y), decoded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["search", "rms", "optimal"])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_vectors_decode_to_finite_values(bits: int, rounding: str) -> None:
    x = mx.stack([
        mx.zeros((32,)), mx.full((32,), 1e-30), mx.full((32,), 3e5), mx.full((32,), -2.0),
        mx.zeros((32,)).at[3].add(50.0),
    ])  # fmt: skip
    codes, scales = quantize.quantize(x, (bits,), rounding)  # type: ignore[arg-type]
    y = np.array(quantize.dequantize(codes, scales, (bits,)))
    assert np.isfinite(y).all()
    assert (y[0] == 0).all()
    if rounding != "rms":  # the others fit the scale to the levels
        np.testing.assert_allclose(y[3], -2.0, rtol=0.02)


def test_groups_without_bits_decode_to_zero_and_do_not_weigh_in_the_scale() -> None:
    x = gaussian(50, 96)
    loud = mx.concatenate([x[:, :32], 1000 * x[:, 32:64], x[:, 64:]], axis=1)
    codes, scales = quantize.quantize(loud, (4, 0, 2), "search")
    y = quantize.dequantize(codes, scales, (4, 0, 2))
    assert float(mx.abs(y[:, 32:64]).max()) == 0.0
    error = ((y - loud)[:, :32] ** 2).sum() / (loud[:, :32] ** 2).sum()
    assert float(error) < 0.02


# Packing

GROUPS = st.lists(st.sampled_from([0, *BITS]), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=30)
@given(k_bits=GROUPS, v_bits=GROUPS, seed=st.integers(0, 2**32 - 1))
def test_blocks_are_packed_bit_for_bit_as_specified(
    k_bits: tuple[int, ...], v_bits: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    format = Format(k_bits, v_bits)

    def side(bits: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        codes = [rng.integers(0, 2**b if b else 1, (2, 32, 32)) for b in bits]
        return np.concatenate(codes, axis=-1), rng.random((2, 32)).astype(np.float16)

    k, v = side(k_bits), side(v_bits)
    blocks = packing.pack_blocks(
        (mx.array(k[0].astype(np.uint32)), mx.array(k[1])),
        (mx.array(v[0].astype(np.uint32)), mx.array(v[1])),
        format,
    )
    assert blocks.shape == (2, format.words) and blocks.dtype == mx.uint32
    codes, scales = oracle.unpack(np.array(blocks), format)
    for ours, codes_, scales_, expected in (
        (packing.unpack_k(blocks, format), codes[0], scales[0], k),
        (packing.unpack_v(blocks, format), codes[1], scales[1], v),
    ):
        np.testing.assert_array_equal(codes_, expected[0])
        np.testing.assert_array_equal(scales_, expected[1])
        np.testing.assert_array_equal(np.array(ours[0]), expected[0])
        np.testing.assert_array_equal(np.array(ours[1]), expected[1])


def test_a_block_costs_its_bits_and_one_scale_row() -> None:
    assert Format.of(4, 4, 128, 128).words == 32 * (4 * 8 + 1)
    assert Format.of((8, 0), 3, 64, 40).v_bits == (3, 3)
    with pytest.raises(ConfigError, match="has 3 channel groups, but head_dim 64 has 2"):
        Format.of((4, 4, 4), 4, 64, 64)
