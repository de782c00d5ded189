"""Blocks -> rotated rows, for prefill, for trimming and for models without fused attention."""

import mlx.core as mx

from leankv_mlx.codec.codecs import CODECS
from leankv_mlx.codec.format import TILE
from leankv_mlx.codec.packing import unpack_k, unpack_v
from leankv_mlx.kernels.types import Backend, Centers, Rows, Tier

_SLAB = 64
"""Blocks decoded at a time: bounds the temporaries, which are wider than the result."""


def dequantize_ops(body: Tier, centers: Centers, dtype: mx.Dtype) -> Rows:
    """Ops-based reference implementation of `dequantize`."""
    decode, sides = CODECS[body.format.codec].decode, []
    for unpack, bits, center in (
        (unpack_k, body.format.k_bits, centers.k),
        (unpack_v, body.format.v_bits, centers.v),
    ):
        slabs = []
        for start in range(0, body.table.shape[1], _SLAB):
            blocks = body.pool[body.table[:, start : start + _SLAB]]
            rows = decode(*unpack(blocks, body.format), bits) + center[:, None, None]
            slabs.append(rows.astype(dtype).reshape(rows.shape[0], -1, rows.shape[-1]))
        empty = mx.zeros((body.table.shape[0], 0, TILE * len(bits)), dtype)
        sides.append(mx.concatenate(slabs, axis=1) if slabs else empty)
    return Rows(*sides)


def dequantize(body: Tier, centers: Centers, dtype: mx.Dtype, backend: Backend) -> Rows:
    """Decode a body and add its centers.

    Returns:
        Keys [H, M * 32, Dk] and values [H, M * 32, Dv] in `dtype`, slots in order. Slots behind
        the length of a head are garbage.
    """
    return backend.dequantize(body, centers, dtype)
