"""Any slots of a body -> new blocks, bit for bit: for pruning, trimming and compaction."""

import mlx.core as mx

from leankv_mlx.codec.format import TILE
from leankv_mlx.codec.packing import pack_blocks, unpack_k, unpack_v
from leankv_mlx.errors import ShapeError
from leankv_mlx.kernels.types import Backend, Tier


def repack_ops(body: Tier, index: mx.array) -> mx.array:
    """Ops-based reference implementation of `repack`."""
    heads = index.shape[0]
    filled = mx.pad(index, [(0, 0), (0, -index.shape[1] % TILE)], constant_values=-1)
    kept, source = filled >= 0, mx.maximum(filled, 0)
    blocks = body.pool[body.table]
    sides = []
    for unpack in (unpack_k, unpack_v):
        codes, scales = unpack(blocks, body.format)
        codes = mx.take_along_axis(codes.flatten(1, 2), source[..., None], axis=1)
        scales = mx.where(kept, mx.take_along_axis(scales.flatten(1, 2), source, axis=1), 0)
        sides.append(
            (
                mx.where(kept[..., None], codes, 0).reshape(heads, -1, TILE, codes.shape[-1]),
                scales.astype(mx.float16).reshape(heads, -1, TILE),
            )
        )
    k, v = sides
    return pack_blocks(k, v, body.format)


def repack(body: Tier, index: mx.array, backend: Backend) -> mx.array:
    """Gather slots into new blocks without decoding them.

    Args:
        body: where the slots are; M of at least 1.
        index: int32 [H, T], slot numbers of each head in the order wanted; -1 leaves a slot empty
            (code 0, scale 0).
        backend: who computes it.

    Returns:
        Blocks uint32 [H, ceil(T / 32), format.words].

    Raises:
        ShapeError: the index does not fit the body.
    """
    if index.ndim != 2 or index.shape[0] != body.table.shape[0] or not body.table.shape[1]:
        raise ShapeError(
            f"[repack] expected an index [{body.table.shape[0]}, T] and a body with blocks, "
            f"got {index.shape} and a table {body.table.shape}."
        )
    return backend.repack(body, index)
