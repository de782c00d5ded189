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
    _check(exact, new, 3, rotations)
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
    if not exact or any(x.ndim != 4 or x.shape[0] != len(exact) for x in new):
        shapes = " and ".join(str(x.shape) for x in new)
        raise ShapeError(f"[append_batch] expected rows [{len(exact)}, H, T, D], got {shapes}.")
    for old in exact:
        _check(old, new, 4, rotations)
    if backend.append_batch is not None:
        return backend.append_batch(exact, new, rotations)
    return [
        backend.append(old, Rows(*(x[i] for x in new)), rotations) for i, old in enumerate(exact)
    ]


def _check(exact: Rows, new: Rows, ndim: int, rotations: Rotations) -> None:
    """Whether new rows [.., H, T, head_dim] fit behind the exact ones of a sequence."""
    for old, rows, rotation in zip(exact, new, rotations, strict=True):
        heads, _, dim = old.shape
        if (
            rows.ndim != ndim
            or rows.shape[-3] != heads
            or rows.shape[-1] != rotation.head_dim
            or dim != rotation.dim
        ):
            raise ShapeError(
                f"[append] expected rows [{heads}, T, {rotation.head_dim}] behind "
                f"[.., .., {rotation.dim}], got {rows.shape} behind {old.shape}."
            )
