"""What lies between a layer's products and its attention: norm and rotary position of each head.

MLX's CPU device makes some twenty operations of each norm and each rotation, and a decode step of a
small model waits for them longer than it computes them. Here queries and keys are one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from leankv_mlx.errors import ShapeError
from leankv_mlx.kernels import cpu
from leankv_mlx.projections.types import Norm


class Turn(NamedTuple):
    """How a head turns with its position (RoPE, arXiv 2104.09864): channels i and i + R/2 are a
    pair, for the first R of a head.

    Attributes:
        freqs: float32 [R/2], radians a position.
        scale: of positions.
    """

    freqs: mx.array
    scale: float = 1.0


Norms = tuple[Norm | None, Norm | None]
NO_NORMS: Norms = (None, None)


class Heads(NamedTuple):
    """Queries [B, Hq, L, D] and keys [B, H, L, D]."""

    queries: mx.array
    keys: mx.array


def heads(
    queries: mx.array,
    keys: mx.array,
    dim: int,
    turn: Turn,
    offset: int | Sequence[int],
    norms: Norms = NO_NORMS,
) -> Heads:
    """Split products into heads, norm each, and turn it by the position of its token.

    Args:
        queries: [B, L, Hq * D], float32.
        keys: [B, L, H * D], float32.
        dim: D.
        offset: position of the first token, of all sequences or of each of the B.
        norms: of queries and of keys, weights [D].

    Raises:
        ShapeError: the arguments do not fit each other.
    """
    q, k, turned = queries.shape, keys.shape, 2 * turn.freqs.size
    fits = len(q) == len(k) == 3 and q[:2] == k[:2] and q[2] % dim == k[2] % dim == 0
    if not fits or turned > dim:
        raise ShapeError(
            f"[heads] expected [B, L, heads * {dim}] twice and at most {dim // 2} frequencies, got "
            f"{q}, {k} and {turn.freqs.size}."
        )
    fits = queries.dtype == keys.dtype == turn.freqs.dtype == mx.float32
    for norm in norms:
        if norm is not None:
            fits = fits and norm.weight.dtype == mx.float32 and norm.weight.shape == (dim,)
    if not fits:
        raise ShapeError(f"[heads] expected float32 arrays, and norms [{dim}].")
    offsets = [offset] if isinstance(offset, int) else list(offset)
    if not offsets or len(offsets) not in (1, q[0]):
        raise ShapeError(f"[heads] expected one offset, or one for each of {q[0]}: {len(offsets)}.")
    return Heads(*cpu.load().heads(queries, keys, dim, turn.freqs, turn.scale, offsets, *norms))


def heads_ops(
    queries: mx.array,
    keys: mx.array,
    dim: int,
    turn: Turn,
    offset: int | Sequence[int],
    norms: Norms = NO_NORMS,
) -> Heads:
    """`heads` in MLX ops."""
    length = queries.shape[1]
    offsets = mx.array([offset] if isinstance(offset, int) else list(offset))
    positions = offsets[:, None] + mx.arange(length)
    angles = (positions.astype(mx.float32) * turn.scale)[:, None, :, None] * turn.freqs
    half = turn.freqs.size
    made = []
    for side, norm in zip((queries, keys), norms, strict=True):
        x = side.reshape(*side.shape[:2], -1, dim).swapaxes(1, 2)
        if norm is not None:
            x = mx.fast.rms_norm(x, norm.weight, norm.eps)
        first, second, rest = mx.split(x, [half, 2 * half], axis=-1)
        cosines, sines = mx.cos(angles), mx.sin(angles)
        turned = [first * cosines - second * sines, first * sines + second * cosines, rest]
        made.append(mx.concatenate(turned, axis=-1))
    return Heads(*made)
