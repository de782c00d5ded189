"""All tokens of a sequence, decoded: the working copy of a prefill, and what models without fused
attention read."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.types import Backend, Body, Centers, Rotations, Rows


def gather_ops(
    bodies: Sequence[Body],
    exact: Rows,
    centers: Centers | None,
    *,
    sinks: int,
    dtype: mx.Dtype,
    rotations: Rotations | None,
    decode: Callable[[Body, Centers, mx.Dtype], Rows] = dequantize_ops,
) -> Rows:
    """Ops-based reference implementation of `gather`; `decode` is how a body is dequantized."""
    rows = Rows(*(x.astype(dtype) for x in exact))
    if bodies:
        assert centers is not None  # fitted before the first body was encoded
        decoded = [decode(body, centers, dtype) for body in bodies]
        parts = (
            [x[:, :sinks], *(body[side] for body in decoded), x[:, sinks:]]
            for side, x in enumerate(rows)
        )
        rows = Rows(*(mx.concatenate(part, axis=1) for part in parts))
    if rotations is None:
        return rows
    return Rows(*(r.undo(x) for r, x in zip(rotations, rows, strict=True)))


def gather(
    bodies: Sequence[Body],
    exact: Rows,
    centers: Centers | None,
    *,
    sinks: int,
    dtype: mx.Dtype,
    rotations: Rotations | None,
    backend: Backend,
) -> Rows:
    """The first `sinks` exact rows, the bodies with all their slots, the other exact rows.

    Returns:
        Keys [H, N, Dk] and values [H, N, Dv] in `dtype`. With `rotations` they are un-rotated,
        [H, N, head_dim]. Slots behind the length of a head are garbage.
    """
    return backend.gather(bodies, exact, centers, sinks=sinks, dtype=dtype, rotations=rotations)
