"""New rows, rotated and put behind the exact rows."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.errors import ShapeError
from leankv_mlx.kernels.types import Backend, Rotations, Rows, Scales


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
    exact: Sequence[Rows],
    new: Rows,
    rotations: Rotations,
    backend: Backend,
    scales: Scales | None = None,
) -> list[Rows]:
    """`append` for several sequences, each with as many exact rows as it has.

    Args:
        exact: of the B sequences, [H, E, D] each.
        new: rows as the model made them, [B, H, T, head_dim].
        rotations: of the keys and of the values, the same for all.
        backend: who computes it.
        scales: what the keys of each are divided by, see `kernels.types.Scales`; None for nothing.

    Returns:
        Rows [H, E + T, D] of each.

    Raises:
        ShapeError: the new rows do not fit.
    """
    if not exact or any(x.ndim != 4 or x.shape[0] != len(exact) for x in new):
        shapes = " and ".join(str(x.shape) for x in new)
        raise ShapeError(f"[append_batch] expected rows [{len(exact)}, H, T, D], got {shapes}.")
    _check(exact[0], new, 4, rotations)
    like = [x.shape[::2] for x in exact[0]]
    for old in exact:
        if [x.shape[::2] for x in old] != like:
            _check(old, new, 4, rotations)
    scales = check_scales(scales, len(exact), new.k.shape[1], new.k.shape[3])
    if backend.append_batch is None:
        return each_append(backend.append, exact, new, rotations, scales)
    return backend.append_batch(exact, new, rotations, scales)


def each_append(
    append: Callable[[Rows, Rows, Rotations], Rows],
    exact: Sequence[Rows],
    new: Rows,
    rotations: Rotations,
    scales: Scales,
) -> list[Rows]:
    """`append_batch` by an operation on one sequence."""
    rows = map(Rows, _scaled(new.k, scales), new.v)
    return [append(old, own, rotations) for old, own in zip(exact, rows, strict=True)]


def scaled_keys(keys: mx.array, scales: Scales) -> mx.array:
    """keys: [B, H, T, head_dim] -> what is to be rotated, for a backend without scales in its
    operation; in float32 if that differs."""
    if all(x is None for x in scales):
        return keys
    return mx.stack([k.astype(mx.float32) for k in _scaled(keys, scales)])


def _scaled(keys: mx.array, scales: Scales) -> list[mx.array]:
    """The keys of each sequence, [H, T, head_dim]; in float32 if that changes them."""
    return [
        k if x is None else Equalizer(x).apply(k.astype(mx.float32))
        for k, x in zip(keys, scales, strict=True)
    ]


def check_scales(scales: Scales | None, sequences: int, heads: int, head_dim: int) -> Scales:
    """The scales, one entry for each sequence.

    Raises:
        ShapeError: they do not fit.
    """
    if scales is None:
        return [None] * sequences
    if len(scales) != sequences or any(
        [x is not None and (x.shape != (heads, head_dim) or x.dtype != mx.float32) for x in scales]
    ):
        raise ShapeError(
            f"[scales] expected float32 [{heads}, {head_dim}] or None for each of {sequences} "
            f"sequences, got {[x if x is None else (x.dtype, x.shape) for x in scales]}."
        )
    return scales


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
