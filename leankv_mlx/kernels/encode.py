"""Rotated rows -> blocks."""

import mlx.core as mx

from leankv_mlx.codec.codecs import CODECS
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.codec.packing import pack_blocks
from leankv_mlx.config import Rounding
from leankv_mlx.errors import ShapeError
from leankv_mlx.kernels.types import Backend, Centers, Rows


def encode_ops(
    rows: Rows,
    centers: Centers,
    format: Format,
    rounding: Rounding,
    shaping: mx.array | None = None,
) -> mx.array:
    """Ops-based reference implementation of `encode`."""
    sides = []
    bits_of, shapings = (format.k_bits, format.v_bits), (shaping, None)
    for x, center, bits, shape in zip(rows, centers, bits_of, shapings, strict=True):
        centered = x.astype(mx.float32) - center[:, None]
        # Slots behind the last row get a scale of 0.
        filled = mx.pad(centered, [(0, 0), (0, -x.shape[1] % TILE), (0, 0)])
        slots = filled.reshape(x.shape[0], -1, TILE, x.shape[2])
        sides.append(CODECS[format.codec].encode(slots, bits, rounding, shape))
    k, v = sides
    return pack_blocks(k, v, format)


def encode(
    rows: Rows,
    centers: Centers,
    format: Format,
    rounding: Rounding,
    backend: Backend,
    shaping: mx.array | None = None,
) -> mx.array:
    """Center, quantize and pack.

    Args:
        rows: rotated keys [H, T, Dk] and values [H, T, Dv]; any float dtype.
        centers: what is subtracted first.
        format: bits of each channel group.
        rounding: how the scales are found.
        backend: who computes it.
        shaping: what errors of the keys cost, float32 [H, Dk, Dk], see `codec.shaping`; None if
            all channels are alike. rounding=optimal has no use for it.

    Returns:
        Blocks uint32 [H, ceil(T / 32), format.words].

    Raises:
        ShapeError: the rows do not fit the format or each other.
    """
    expected = (rows.k.shape[0], rows.k.shape[1])
    if rows.k.shape[2] != format.k_dim or rows.v.shape != (*expected, format.v_dim):
        raise ShapeError(
            f"[encode] expected [H, T, {format.k_dim}] and [H, T, {format.v_dim}], "
            f"got {rows.k.shape} and {rows.v.shape}."
        )
    if shaping is not None and shaping.shape != (rows.k.shape[0], *2 * (format.k_dim,)):
        raise ShapeError(
            f"[encode] expected shaping [H, {format.k_dim}, {format.k_dim}] of "
            f"{rows.k.shape[0]} heads, got {shaping.shape}."
        )
    return backend.encode(rows, centers, format, rounding, shaping)
