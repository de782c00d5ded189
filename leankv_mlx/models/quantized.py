"""The quantized types of GGUF as MLX's affine triples: weight, scales, biases.

MLX has `scale * level + bias` in groups of 32 columns, levels without a sign, packed into uint32
from the lowest bit on (8 levels of 5 bits in 5 bytes). Seven types of GGUF are just that. Their
scales are float16 where they are in the file (and biases are multiples of them by a power of two),
float32 where they are products: nothing is rounded. All other types are dequantized and quantized
again to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from leankv_mlx.models.container import FlawError

GROUP = 32
AGAIN_BITS = 8
"""Bits of what is quantized again."""

Array = np.ndarray[Any, Any]


class Parts(NamedTuple):
    """Blocks of a type, taken apart.

    Attributes:
        levels: [blocks, GROUP], uint8.
        scales, biases: [blocks]; [n, 8] and so on count as blocks too.
    """

    levels: Array
    scales: Array
    biases: Array


class Triple(NamedTuple):
    """What MLX's quantized layers hold.

    Attributes:
        weight: [rows, columns * bits / 32], uint32.
        scales, biases: [rows, columns / GROUP], float16 or float32.
    """

    weight: Array
    scales: Array
    biases: Array


@dataclass(frozen=True)
class Affine:
    """A type that maps exactly.

    Attributes:
        bits: of a level.
        scales: safetensors' name of the dtype that holds the scales without rounding.
        split: [n, bytes of a block] uint8 -> its parts.
    """

    bits: int
    scales: str
    split: Callable[[Array], Parts]


def _half(blocks: Array, at: int) -> Array:
    """The float16 at a byte of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]


def _nibbles(packed: Array) -> Array:
    """[..., n] bytes -> [..., 2n] levels: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Array) -> Array:
    """[n, 4] bytes -> [n, 32] levels' fifth bits, in place."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(blocks: Array) -> Parts:
    scale = _half(blocks, 0)
    return Parts(_nibbles(blocks[:, 2:]), scale, scale * np.float16(-8))


def _q4_1(blocks: Array) -> Parts:
    return Parts(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Array) -> Parts:
    scale = _half(blocks, 0)
    levels = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Parts(levels, scale, scale * np.float16(-16))


def _q5_1(blocks: Array) -> Parts:
    levels = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return Parts(levels, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Array) -> Parts:
    scale = _half(blocks, 0)
    return Parts(blocks[:, 2:] ^ 128, scale, scale * np.float16(-128))


def _products(blocks: Array) -> tuple[Array, Array]:
    """Scales and biases of the 8 groups of each K block: float16 times 6 bits, exact in float32."""
    low, minimum, high = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=-1)
    bias = np.concatenate([minimum & 63, high >> 4 | (minimum >> 2 & 48)], axis=-1)
    d, dmin = (_half(blocks, at).astype(np.float32)[:, None] for at in (0, 2))
    return (d * scale).reshape(-1), (-dmin * bias).reshape(-1)


def _q4_k(blocks: Array) -> Parts:
    return Parts(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)), *_products(blocks))


def _q5_k(blocks: Array) -> Parts:
    levels = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of byte c is the fifth bit of channel c in group g.
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return Parts(levels | fifth << 4, *_products(blocks))


AFFINE: dict[str, Affine] = {
    "Q4_0": Affine(4, "F16", _q4_0),
    "Q4_1": Affine(4, "F16", _q4_1),
    "Q5_0": Affine(5, "F16", _q5_0),
    "Q5_1": Affine(5, "F16", _q5_1),
    "Q8_0": Affine(8, "F16", _q8_0),
    "Q4_K": Affine(4, "F32", _q4_k),
    "Q5_K": Affine(5, "F32", _q5_k),
}


def bits_of(kind: str) -> int:
    """Bits that a type has in MLX."""
    return AFFINE[kind].bits if kind in AFFINE else AGAIN_BITS


def scales_of(kind: str) -> str:
    """Safetensors' name of the dtype that holds a type's scales."""
    return AFFINE[kind].scales if kind in AFFINE else "F32"


def check_readable(kind: str) -> None:
    """Whether a type can be read at all, before anything is.

    Raises:
        FlawError: it cannot.
    """
    if kind not in AFFINE:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        dequantize(np.zeros((1, nbytes), np.uint8), kind)


def dequantize(rows: Array, kind: str) -> Array:
    """[rows, bytes] uint8 of any type, dense ones too -> [rows, columns] float32.

    Raises:
        FlawError: nothing here reads this type.
    """
    from gguf import GGMLQuantizationType, quants

    try:
        with np.errstate(all="ignore"):
            return quants.dequantize(rows, GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise FlawError(f"it has tensors of type {kind}, which cannot be read") from error


def triple(rows: Array, kind: str) -> Triple:
    """Rows of a quantized type as MLX has them.

    Args:
        rows: [rows, bytes], uint8, contiguous.

    Raises:
        FlawError: scales are not finite, or not in half precision with their biases.
    """
    affine = AFFINE.get(kind)
    if affine is None:
        found = _quantized_again(dequantize(rows, kind))
    else:
        # Whole blocks fill a row, whatever their size: its width in the file does not matter here.
        levels, scales, biases = _split(rows, kind, affine)
        weight = pack(levels.reshape(-1, GROUP), affine.bits)
        found = Triple(*(part.reshape(len(rows), -1) for part in (weight, scales, biases)))
    if not (np.isfinite(found.scales).all() and np.isfinite(found.biases).all()):
        raise FlawError("it has weights that are no numbers")
    return found


def _split(rows: Array, kind: str, affine: Affine) -> Parts:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    with np.errstate(all="ignore"):
        return affine.split(rows.reshape(-1, nbytes))


def pack(levels: Array, bits: int) -> Array:
    """Levels in MLX's order: [n, GROUP] uint8 -> [n, bits] uint32, for 4, 5 and 8 bits."""
    if bits == 4:
        packed = levels[:, 0::2] | levels[:, 1::2] << 4
    elif bits == 5:
        eights = levels.reshape(-1, 8).astype("<u8")
        words = eights[:, 0].copy()
        for at in range(1, 8):
            words |= eights[:, at] << np.uint64(5 * at)
        packed = words.view(np.uint8).reshape(-1, 8)[:, :5]
    else:
        packed = levels
    return np.ascontiguousarray(packed).reshape(len(levels), -1).view("<u4")


def _quantized_again(values: Array) -> Triple:
    import mlx.core as mx

    if not np.isfinite(values).all():
        raise FlawError("it has weights that are no numbers")
    found = mx.quantize(mx.array(values), group_size=GROUP, bits=AGAIN_BITS)
    return Triple(*map(np.array, found))
