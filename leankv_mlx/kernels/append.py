"""New rows, rotated and put behind the exact rows."""

from collections.abc import Sequence

import mlx.core as mx

from leankv_mlx.errors import ShapeError
from leankv_mlx.kernels.types import Backend, Rotations, Rows


def append_ops(exact: Rows, new: Rows, rotations: Rotations) -> Rows:
    """Ops-based reference implementation of `append`."""
    return Rows(
        *(
            mx.concatenate([old, rotation.apply(rows).astype(old.dtype)], axis=1)
            for old, rows, rotation in zip(exact, new, rotations, strict=True)
        )
    )


def append(exact: Rows, new: Rows, rotations: Rotations, backend: Backend) -> Rows:
    """Rotate and append.

    Args:
        exact: rotated rows [H, E, D], E may be 0.
        new: rows as the model made them, [H, T, head_dim], in any float dtype; once rotated they
            get that of the exact rows.
        rotations: of the keys and of the values.
        backend: who computes it.

    Returns:
        Rows [H, E + T, D].

    Raises:
        ShapeError: the new rows do not fit.
    """
    _check(exact, new, rotations)
    return backend.append(exact, new, rotations)


def append_batch(
    exact: Sequence[Rows], new: Rows, rotations: Rotations, backend: Backend
) -> list[Rows]:
    """`append` for several sequences, each with as many exact rows as it has.

    Args:
        exact: of the B sequences, [H, E, D] each.
        new: rows as the model made them, [B, H, T, head_dim].
        rotations: of the keys and of the values, the same for all.
        backend: who computes it.

    Returns:
        Rows [H, E + T, D] of each.

    Raises:
        ShapeError: the new rows do not fit.
    """
    if any(x.ndim != 4 or x.shape[0] != len(exact) for x in new):
        shapes = " and ".join(str(x.shape) for x in new)
        raise ShapeError(f"[append_batch] expected rows [{len(exact)}, H, T, D], got {shapes}.")
    if backend.append_batch is not None:
        for old in exact:
            _check(old, Rows(*(x[0] for x in new)), rotations)
        return backend.append_batch(exact, new, rotations)
    return [
        append(old, Rows(*(x[i] for x in new)), rotations, backend) for i, old in enumerate(exact)
    ]


def _check(exact: Rows, new: Rows, rotations: Rotations) -> None:
    for old, rows, rotation in zip(exact, new, rotations, strict=True):
        fits = rows.ndim == 3 and rows.shape[0] == old.shape[0] and old.shape[2] == rotation.dim
        if not fits or rows.shape[2] != rotation.head_dim:
            raise ShapeError(
                f"[append] expected rows [{old.shape[0]}, T, {rotation.head_dim}] behind "
                f"[.., .., {rotation.dim}], got {rows.shape} behind {old.shape}."
            )
