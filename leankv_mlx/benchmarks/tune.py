"""Measures how decode attention is best spread over this GPU, and keeps the result."""

from __future__ import annotations

import mlx.core as mx

from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.codec.rotation import hadamard
from leankv_mlx.kernels import Centers, Rows, Tier, View
from leankv_mlx.kernels.gpu.attention import DecodeAttention, shape_of
from leankv_mlx.kernels.gpu.geometry import Geometry
from leankv_mlx.kernels.gpu.launch import MlxLauncher

EXACT_ROWS = 68
"""Sink tokens and a window, as the default settings have them."""


def tune_attention(
    launch: MlxLauncher, *, heads: int, group: int, head_dim: int, slots: int
) -> Geometry:
    """Time all candidates on a body of 4-bit codes and set the best for this bucket of lengths.

    Args:
        launch: of the device, from `kernels.gpu.devices.launcher`.
        heads: KV heads.
        group: query heads of a KV head.
        head_dim: of the model.
        slots: tokens in the body.
    """
    rotation = hadamard(head_dim)
    dim, blocks = rotation.dim, -(-slots // TILE)
    format = Format.of(4, 4, dim, dim)
    one = mx.array([1.0], mx.float16).view(mx.uint16).astype(mx.uint32)
    words = mx.random.randint(0, 2**31 - 1, (heads * blocks, format.words - TILE))
    scales = mx.broadcast_to(one | (one << 16), (heads * blocks, TILE))
    tier = Tier(
        mx.concatenate([words.astype(mx.uint32), scales], axis=1),
        mx.arange(heads * blocks, dtype=mx.int32).reshape(heads, blocks),
        mx.full((heads,), blocks * TILE, mx.int32),
        format,
        full=True,
    )
    exact = Rows(*(mx.random.normal((heads, EXACT_ROWS, dim), mx.float16) for _ in range(2)))
    centers = Centers(mx.zeros((heads, dim)), mx.zeros((heads, dim)))
    queries = mx.random.normal((heads * group, 1, head_dim), mx.float16)
    mx.eval(tier.pool, tier.table, tier.lengths, exact, centers, queries)
    attend = DecodeAttention(launch)
    view = View([tier], exact, centers, 4, (rotation, rotation))

    def run() -> None:
        mx.eval(attend(queries, view, scale=head_dim**-0.5, mask=None, sink_logits=None))

    return launch.tuner.tune(shape_of(queries, [view], [tier], True), run)
