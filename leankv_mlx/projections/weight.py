"""Quantized weights with the outputs of an input channel side by side.

MLX packs a row of a quantized weight along the input, so leaving out an input channel saves no
bytes there. Here the codes of one channel lie together, for a tile of outputs: what is not
multiplied is not read. The numbers are those of MLX (affine: code * scale + bias, for each output
and group of inputs), and `restore` gives back its arrays bit for bit.

The layout. Shapes: K inputs, N outputs; a word has F = 32 // bits codes, and a tile P = `LANES` * F
outputs (128 at 4 bits), so that the codes of a channel are one cache line of 64 bytes. T = ceil(N /
P) tiles, the last one padded with zeros. Output n is in tile t = n // P; there p = n % P, field
f = p // LANES and lane l = p % LANES, so that a field of all lanes is LANES outputs in a row:

- codes uint32 [T, K, LANES]: its code for channel k is in word [t, k, l], in the `bits` bits from
  bit f * bits on. Bits that F codes leave (2 at 3, 5 and 6 bits) are 0.
- scales and biases [T, K / group, P]: at [t, k // group, p].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from leankv_mlx.errors import ShapeError

LANES = 16
"""Words of a channel in a tile: a cache line."""

_AT_ONCE = 2**20
"""Numbers that are unpacked together: some 20 MB."""

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def tile_outputs(bits: int) -> int:
    """P: outputs of a tile."""
    return LANES * (32 // bits)


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized weight [N, K], see the layout above.

    Attributes:
        codes: uint32 [T, K, LANES].
        scales: [T, K / group, P], of the dtype that the model has.
        biases: the same.
        outputs: N.
        bits: of a code, one of BITS.
        group: inputs that share a scale and a bias, one of GROUPS.
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
        scales: [N, K / group], float32, float16 or bfloat16.
        biases: [N, K / group], of the same dtype.

    Raises:
        ShapeError: they are not the arrays of one weight.
    """
    _check(codes, scales, biases, group, bits)
    words, outputs = _relaid(codes, group, bits), codes.shape[0]
    return Weight(words, _by_tile(scales, bits), _by_tile(biases, bits), outputs, bits, group)


def restore(weight: Weight) -> tuple[mx.array, mx.array, mx.array]:
    """MLX's arrays, bit for bit: codes [N, K * bits / 32], scales and biases [N, K / group]."""
    fields = _fields(weight.codes, weight.bits)  # [T, K, LANES, F]
    plain = fields.transpose(0, 3, 2, 1).reshape(-1, weight.inputs)[: weight.outputs]
    sides = (
        mx.contiguous(side.swapaxes(1, 2).reshape(-1, side.shape[1])[: weight.outputs])
        for side in (weight.scales, weight.biases)
    )
    scales, biases = sides
    return _packed(plain, weight.bits), scales, biases


def relay_evenly(
    codes: mx.array, scales: mx.array, biases: mx.array, group: int, bits: int
) -> Weight:
    """`relay`, evaluated a part at a time, so that it takes little memory beside the weight."""
    step = _part(bits, scales.shape[-1] * group)
    parts = []
    for first in range(0, codes.shape[0], step):
        cut = slice(first, first + step)
        made = relay(codes[cut], scales[cut], biases[cut], group, bits)
        mx.eval(made.codes, made.scales, made.biases)
        parts.append((made.codes, made.scales, made.biases))
    joined = _joined(parts)
    return Weight(joined[0], joined[1], joined[2], codes.shape[0], bits, group)


def restore_evenly(weight: Weight) -> tuple[mx.array, mx.array, mx.array]:
    """`restore`, evaluated a part at a time."""
    step = _part(weight.bits, weight.inputs)
    per_tile = tile_outputs(weight.bits)
    parts = []
    for first in range(0, weight.outputs, step):
        cut = slice(first // per_tile, (first + step) // per_tile)
        sides = (weight.codes[cut], weight.scales[cut], weight.biases[cut])
        outputs = min(step, weight.outputs - first)
        arrays = restore(
            replace(weight, codes=sides[0], scales=sides[1], biases=sides[2], outputs=outputs)
        )
        mx.eval(arrays)
        parts.append(arrays)
    return _joined(parts)


def _part(bits: int, inputs: int) -> int:
    """Outputs of a part: whole tiles."""
    per_tile = tile_outputs(bits)
    return per_tile * max(1, _AT_ONCE // (per_tile * inputs))


def _joined(
    parts: list[tuple[mx.array, mx.array, mx.array]],
) -> tuple[mx.array, mx.array, mx.array]:
    if len(parts) == 1:
        return parts[0]
    codes, scales, biases = (mx.concatenate(list(side)) for side in zip(*parts, strict=True))
    mx.eval(codes, scales, biases)
    return codes, scales, biases


def rows(weight: Weight, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """Rows of the weight as `mx.dequantize` gives them: [..., K] for ids int [...].

    Args:
        dtype: what they are computed in and have; by default that of the scales.
    """
    per_tile = tile_outputs(weight.bits)
    tile, place = (ids // per_tile)[..., None], (ids % per_tile)[..., None]
    words = _taken(weight.codes, tile, place % LANES)  # [..., K]
    shifts = (place // LANES * weight.bits).astype(mx.uint32)
    codes = (words >> shifts) & ((1 << weight.bits) - 1)
    dtype = dtype or weight.scales.dtype
    scales, biases = (
        _taken(side, tile, place).astype(dtype) for side in (weight.scales, weight.biases)
    )
    return mx.dequantize(_packed(codes, weight.bits), scales, biases, weight.group, weight.bits)


def _check(codes: mx.array, scales: mx.array, biases: mx.array, group: int, bits: int) -> None:
    if bits not in BITS or group not in GROUPS:
        raise ShapeError(
            f"[relay] expected bits of {BITS} and groups of {GROUPS}, got {bits} and {group}."
        )
    inputs = group * scales.shape[-1]
    fits = codes.ndim == scales.ndim == 2 and codes.dtype == mx.uint32
    if not fits or codes.shape != (scales.shape[0], inputs * bits // 32) or not codes.size:
        raise ShapeError(
            f"[relay] expected codes uint32 [N, {inputs} * {bits} / 32] and scales [N, K / group], "
            f"got {codes.dtype} {codes.shape} and {scales.shape}."
        )
    if biases.shape != scales.shape or biases.dtype != scales.dtype:
        raise ShapeError(
            f"[relay] expected biases as the scales {scales.shape}, {scales.dtype}, "
            f"got {biases.shape}, {biases.dtype}."
        )


def _relaid(codes: mx.array, group: int, bits: int) -> mx.array:
    """[N, K * bits / 32] -> [T, K, LANES]."""
    ones = mx.ones((codes.shape[0], codes.shape[1] * 32 // bits // group))
    plain = mx.dequantize(codes, ones, mx.zeros_like(ones), group, bits)  # exact: small integers
    tiles = _padded(plain.astype(mx.uint32), bits).reshape(-1, 32 // bits, LANES, plain.shape[1])
    shifts = (bits * mx.arange(32 // bits, dtype=mx.uint32))[:, None, None]
    return mx.contiguous((tiles << shifts).sum(axis=1).astype(mx.uint32).swapaxes(1, 2))


def _by_tile(side: mx.array, bits: int) -> mx.array:
    """[N, K / group] -> [T, K / group, P]."""
    tiles = _padded(side, bits).reshape(-1, tile_outputs(bits), side.shape[1])
    return mx.contiguous(tiles.swapaxes(1, 2))


def _padded(rows: mx.array, bits: int) -> mx.array:
    """With zeros to a multiple of P."""
    short = -rows.shape[0] % tile_outputs(bits)
    return mx.pad(rows, [(0, short), (0, 0)]) if short else rows


def _fields(words: mx.array, bits: int) -> mx.array:
    """The codes of words: [..., F]."""
    shifts = bits * mx.arange(32 // bits, dtype=mx.uint32)
    return (words[..., None] >> shifts) & ((1 << bits) - 1)


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Codes uint32 [..., K], K a multiple of 32 -> [..., K * bits / 32] as MLX packs them: one
    behind the other, so that 8 of them are `bits` bytes."""
    eights = codes.astype(mx.uint64).reshape(*codes.shape[:-1], -1, 8)
    joined = (eights << (bits * mx.arange(8, dtype=mx.uint64))).sum(axis=-1).astype(mx.uint64)
    used = joined[..., None].view(mx.uint8)[..., :bits]
    return mx.contiguous(used).reshape(*codes.shape[:-1], -1).view(mx.uint32)


def _taken(tiles: mx.array, tile: mx.array, place: mx.array) -> mx.array:
    """[T, n, P] at [tile, :, place] -> [..., n], for tile and place [..., 1]."""
    _, n, width = tiles.shape
    return tiles.reshape(-1)[(tile * n + mx.arange(n)) * width + place]
