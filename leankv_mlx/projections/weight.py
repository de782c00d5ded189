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

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError, ShapeError
from leankv_mlx.kernels import cpu

LANES = 16
"""Words of a channel in a tile: a cache line."""

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


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

    Raises:
        ShapeError: the arrays are not of these shapes.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    outputs: int
    bits: int
    group: int

    def __post_init__(self) -> None:
        _check_numbers("Weight", self.group, self.bits)
        wide = tile_outputs(self.bits)
        words = (-(-self.outputs // wide), *self.codes.shape[1:2], LANES)
        if self.outputs < 1 or self.codes.shape != words or self.codes.dtype != mx.uint32:
            raise ShapeError(
                f"[Weight] expected codes uint32 [T, K, {LANES}] of {self.outputs} outputs, "
                f"got {self.codes.dtype} {self.codes.shape}."
            )
        groups, rest = divmod(self.inputs, self.group)
        if rest or self.scales.shape != (words[0], groups, wide):
            raise ShapeError(
                f"[Weight] expected scales [{words[0]}, {self.inputs} / {self.group}, {wide}], "
                f"got {self.scales.shape}."
            )
        _check_sides("Weight", self.scales, self.biases)

    @cached_property
    def inputs(self) -> int:
        """K."""
        return int(self.codes.shape[1])

    @cached_property
    def native(self) -> Any:
        """It as the extension takes it.

        Raises:
            BackendUnavailableError: the extension is not there or does not fit.
        """
        return cpu.load().Weight(
            self.codes, self.scales, self.biases, self.outputs, self.bits, self.group
        )

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
    native = _native()
    words = native.relay(codes, bits) if native else relaid_ops(codes, group, bits)
    scales, biases = (_by_tile(side, bits) for side in (scales, biases))
    return Weight(words, scales, biases, codes.shape[0], bits, group)


def restore(weight: Weight) -> tuple[mx.array, mx.array, mx.array]:
    """MLX's arrays, bit for bit: codes [N, K * bits / 32], scales and biases [N, K / group]."""
    native = _native()
    codes = native.restore(weight.native) if native else restored_ops(weight)
    scales, biases = (
        mx.contiguous(side.swapaxes(1, 2).reshape(-1, side.shape[1])[: weight.outputs])
        for side in (weight.scales, weight.biases)
    )
    return codes, scales, biases


def rows(weight: Weight, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """Rows of the weight as `mx.dequantize` gives them: [..., K] for ids int [...]. What is no row
    gives any.

    Args:
        dtype: what they have; by default that of the scales.
    """
    dtype = dtype or weight.scales.dtype
    native = _native()
    if native:
        found: mx.array = native.rows(weight.native, ids, dtype)
        return found
    return rows_ops(weight, ids, dtype)


def _native() -> Any | None:
    """The extension, where MLX computes on the CPU and there is one."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    try:
        return cpu.load()
    except BackendUnavailableError:
        return None


def rows_ops(weight: Weight, ids: mx.array, dtype: mx.Dtype) -> mx.array:
    """Ops-based reference implementation of `rows`."""
    per_tile = tile_outputs(weight.bits)
    tile, place = (ids // per_tile)[..., None], (ids % per_tile)[..., None]
    words = _taken(weight.codes, tile, place % LANES)  # [..., K]
    shifts = (place // LANES * weight.bits).astype(mx.uint32)
    codes = (words >> shifts) & ((1 << weight.bits) - 1)
    scales, biases = (
        _taken(side, tile, place).astype(dtype) for side in (weight.scales, weight.biases)
    )
    return mx.dequantize(_packed(codes, weight.bits), scales, biases, weight.group, weight.bits)


def _check(codes: mx.array, scales: mx.array, biases: mx.array, group: int, bits: int) -> None:
    _check_numbers("relay", group, bits)
    fits = codes.ndim == scales.ndim == 2 and codes.dtype == mx.uint32 and codes.size > 0
    if not fits or codes.shape != (scales.shape[0], group * scales.shape[1] * bits // 32):
        raise ShapeError(
            f"[relay] expected codes uint32 [N, K * {bits} / 32] and scales [N, K / {group}], "
            f"got {codes.dtype} {codes.shape} and {scales.shape}."
        )
    _check_sides("relay", scales, biases)


def _check_numbers(operation: str, group: int, bits: int) -> None:
    if bits not in BITS or group not in GROUPS:
        raise ShapeError(
            f"[{operation}] expected bits of {BITS} and groups of {GROUPS}, got {bits} and {group}."
        )


def _check_sides(operation: str, scales: mx.array, biases: mx.array) -> None:
    if scales.dtype not in FLOATS or (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
        raise ShapeError(
            f"[{operation}] expected scales of floats and biases like them, got {scales.dtype} "
            f"{scales.shape} and {biases.dtype} {biases.shape}."
        )


def relaid_ops(codes: mx.array, group: int, bits: int) -> mx.array:
    """Ops-based reference implementation of `relay`: [N, K * bits / 32] -> [T, K, LANES]."""
    ones = mx.ones((codes.shape[0], codes.shape[1] * 32 // bits // group))
    plain = mx.dequantize(codes, ones, mx.zeros_like(ones), group, bits)  # exact: small integers
    tiles = _padded(plain.astype(mx.uint32), bits).reshape(-1, 32 // bits, LANES, plain.shape[1])
    shifts = (bits * mx.arange(32 // bits, dtype=mx.uint32))[:, None, None]
    return mx.contiguous((tiles << shifts).sum(axis=1).astype(mx.uint32).swapaxes(1, 2))


def restored_ops(weight: Weight) -> mx.array:
    """Ops-based reference implementation of `restore`: its codes."""
    fields = _fields(weight.codes, weight.bits)  # [T, K, LANES, F]
    plain = fields.transpose(0, 3, 2, 1).reshape(-1, weight.inputs)[: weight.outputs]
    return _packed(plain, weight.bits)


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
