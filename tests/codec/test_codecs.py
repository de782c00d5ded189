"""A codec is one file and one row: a toy one by the recipe of CONTRIBUTING.md, through the kernels'
operations and a cache's layer."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.shape import Shape
from leankv_mlx.codec.codecs import CODECS, Codec
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import CompressionConfig, Rounding
from leankv_mlx.kernels import available_backends, resolve_backend

# What would be the file: even steps up to the largest channel, groups that are not stored left out.


def encode(
    x: mx.array, bits: tuple[int, ...], rounding: Rounding, shaping: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    tops = _tops(bits)
    kept = mx.where(tops > 0, x, 0.0)
    scales = mx.abs(kept).max(axis=-1).astype(mx.float16)
    unit = kept / mx.maximum(scales.astype(mx.float32), 1e-30)[..., None]
    codes = mx.round((mx.clip(unit, -1, 1) + 1) / 2 * tops)
    return codes.astype(mx.uint32), scales


def decode(codes: mx.array, scales: mx.array, bits: tuple[int, ...]) -> mx.array:
    tops = _tops(bits)
    unit = mx.where(tops > 0, codes.astype(mx.float32) / mx.maximum(tops, 1) * 2 - 1, 0.0)
    return unit * scales.astype(mx.float32)[..., None]


def _tops(bits: tuple[int, ...]) -> mx.array:
    return mx.array(np.repeat([2.0**b - 1 for b in bits], TILE).astype(np.float32))


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "even", Codec(encode, decode))  # what would be the row


def test_a_layer_of_another_codec() -> None:
    """Compressed, decoded, copied and trimmed like any other, by the reference alone."""
    config = CompressionConfig.parse("leankv:k8v4,equalize=off,backend=reference")
    layer = Layer(Shape(2, 64, 64), config, resolve_backend("reference"), (mx.float32,) * 2)
    (share,) = layer._whole
    format = replace(share.formats[0], codec="even")
    here = [name for name, why in available_backends().items() if why is None]
    assert [name for name in here if resolve_backend(name).supports(format)] == ["reference"]
    layer._whole = [replace(share, formats=(format,))]
    rows = mx.random.normal((2, 300, 64), key=mx.random.key(1))
    layer.append(rows, rows)
    layer.compress()
    keys, values = layer.space.undone(*layer.rows())
    assert layer.body is not None and layer.body.slots > 0
    for found, most in ((keys, 0.012), (values, 0.2)):  # steps of 8 and of 4 bits are .02 and .35
        error = mx.sqrt(mx.square(found - rows).mean()).item()
        assert 0 < error < most
    copy = layer.copy()
    layer.trim(250)
    assert mx.allclose(layer.rows().k[:, :50], copy.rows().k[:, :50], atol=1e-5)


def test_groups_that_are_not_stored_are_nothing() -> None:
    x = mx.random.normal((3, 64), key=mx.random.key(2))
    format = Format((8, 0), (8, 8), "even")
    codec = CODECS[format.codec]
    decoded = codec.decode(*codec.encode(x, format.k_bits, "rms"), format.k_bits)
    assert (decoded[:, 32:] == 0).all()
    assert mx.abs(decoded[:, :32] - x[:, :32]).max() < 0.02
