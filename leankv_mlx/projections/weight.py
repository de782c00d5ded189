"""Quantized weights with the outputs of an input channel side by side.

MLX packs a row of a quantized weight along the input, so leaving out an input channel saves no
bytes there. Here the codes of one channel lie together, for a tile of outputs: what is not
multiplied is not read. The numbers are those of MLX (affine: code * scale + bias, for each output
and group of inputs), and `restore` gives back its arrays bit for bit.

Shapes: K inputs, N outputs, T tiles of `TILE` outputs (the last one padded with zeros).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

TILE = 64
"""Outputs whose codes lie side by side."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight [N, K].

    Attributes:
        codes: uint32 [T, K, TILE * bits / 32].
        scales: [K / group, T * TILE], of the dtype that the model has.
        biases: the same.
        outputs: N.
        bits: of a code, 2 to 8.
        group: inputs that share a scale and a bias.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    outputs: int
    bits: int
    group: int

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.codes.shape[1])

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.biases))


def relay(codes: mx.array, scales: mx.array, biases: mx.array, group: int, bits: int) -> Weight:
    """The weight of MLX's arrays.

    Args:
        codes: uint32 [N, K * bits / 32], as `mx.quantize` packs them.
        scales: [N, K / group].
        biases: [N, K / group].
    """
    outputs = codes.shape[0]
    plain = _unpacked(codes, bits)  # [N, K]
    padded = _padded(plain)  # [T * TILE, K]
    tiles = padded.reshape(-1, TILE, plain.shape[1]).transpose(0, 2, 1)
    return Weight(_packed(tiles, bits), _padded(scales).T, _padded(biases).T, outputs, bits, group)


def restore(weight: Weight) -> tuple[mx.array, mx.array, mx.array]:
    """MLX's arrays, bit for bit: codes [N, K * bits / 32], scales and biases [N, K / group]."""
    plain = _unpacked(weight.codes, weight.bits)  # [T, K, TILE]
    flat = plain.transpose(0, 2, 1).reshape(-1, weight.inputs)[: weight.outputs]
    scales, biases = (mx.contiguous(x.T[: weight.outputs]) for x in (weight.scales, weight.biases))
    return _packed(flat, weight.bits), scales, biases


def rows(weight: Weight, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """Rows of the weight as `mx.dequantize` gives them: [..., K] for ids int [...].

    Args:
        dtype: what they are computed in and have; by default that of the scales.
    """
    tiles, inside = ids // TILE, ids % TILE
    codes = _unpacked(weight.codes[tiles], weight.bits)  # [..., K, TILE]
    chosen = mx.take_along_axis(codes, inside[..., None, None], axis=-1)[..., 0]  # [..., K]
    packed = _packed(chosen, weight.bits)
    dtype = dtype or weight.scales.dtype
    scales, biases = (x.T[ids].astype(dtype) for x in (weight.scales, weight.biases))
    return mx.dequantize(packed, scales, biases, weight.group, weight.bits)


def _padded(rows: mx.array) -> mx.array:
    """With zeros to a multiple of TILE."""
    short = -rows.shape[0] % TILE
    return mx.pad(rows, [(0, short), (0, 0)]) if short else rows


def _unpacked(words: mx.array, bits: int) -> mx.array:
    """Numbers [..., n] of `bits` bits, one after the other, from uint32 [..., n * bits / 32]."""
    places = mx.arange(32, dtype=mx.uint32)
    all_bits = (words[..., None] >> places) & 1
    each = all_bits.reshape(*words.shape[:-1], -1, bits)
    return (each << mx.arange(bits, dtype=mx.uint32)).sum(axis=-1).astype(mx.uint32)


def _packed(numbers: mx.array, bits: int) -> mx.array:
    """The inverse of `_unpacked`."""
    each = (numbers[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1
    all_bits = each.reshape(*numbers.shape[:-1], -1, 32)
    return (all_bits << mx.arange(32, dtype=mx.uint32)).sum(axis=-1).astype(mx.uint32)
