"""The codecs: how vectors become codes and one scale each, and back.

Bits are a codec's parameter. Whatever it makes of them, a block has so many bits for each channel
of a group and an fp16 scale for each vector, so packing, tables, moves of slots and files know
nothing of codecs; a code for several channels is theirs side by side. A backend says which codecs
its kernels decode (`Backend.supports`); the reference computes all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.codec.quantize import Bits, dequantize, quantize
from leankv_mlx.config import Rounding


@dataclass(frozen=True)
class Codec:
    """One of them.

    Attributes:
        encode: rotated, centered vectors float32 [..., D], bits of each channel group, how the
            scale is found, and what errors cost (`codec.shaping`), if that is known -> codes uint32
            [..., D], below 2^bits and 0 in groups that are not stored, and scales fp16 [...].
        decode: codes, scales and bits -> float32 [..., D]; 0 where nothing is stored, and where the
            scale is 0.
    """

    encode: Callable[[mx.array, Bits, Rounding, mx.array | None], tuple[mx.array, mx.array]]
    decode: Callable[[mx.array, mx.array, Bits], mx.array]


CUBIC = "cubic"
CODECS: dict[str, Codec] = {CUBIC: Codec(quantize, dequantize)}
"""By `Format.codec`."""
