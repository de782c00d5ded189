"""All tokens of a layer, decoded: the working copy of a prefill, and what models without fused
attention read."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.types import Backend, Centers, Rows, Tier, View


def gather_ops(
    view: View,
    dtype: mx.Dtype,
    decode: Callable[[Tier, Centers, mx.Dtype], Rows] = dequantize_ops,
) -> Rows:
    """Ops-based reference implementation of `gather`; `decode` is how a tier is dequantized."""
    rows, sinks = Rows(*(x.astype(dtype) for x in view.exact)), view.sinks
    if any(tier.heads is not None for tier in view.tiers):
        rows = _side_by_side(view, dtype, decode)
    elif view.tiers:
        assert view.centers is not None  # fitted before the first block was encoded
        decoded = [decode(tier, view.centers, dtype) for tier in view.tiers]
        parts = (
            [x[:, :sinks], *(tier[side] for tier in decoded), x[:, sinks:]]
            for side, x in enumerate(rows)
        )
        rows = Rows(*(mx.concatenate(part, axis=1) for part in parts))
    if view.rotations is None:
        return rows
    return Rows(*(r.undo(x) for r, x in zip(view.rotations, rows, strict=True)))


def _side_by_side(
    view: View, dtype: mx.Dtype, decode: Callable[[Tier, Centers, mx.Dtype], Rows]
) -> Rows:
    """The rows of tiers that have heads of their own, each decoded for those alone. What other
    heads have in its place is 0, or what their own tier put there.

    One tier after another is put in place at once: all of them decoded beside the rows would be
    another working copy.
    """
    assert view.centers is not None
    sinks, slots = view.sinks, view.slots
    sides = []
    for x in view.exact:
        heads, exact, dim = x.shape
        rows = mx.zeros((heads, exact + slots, dim), dtype)
        rows[:, :sinks] = x[:, :sinks].astype(dtype)
        rows[:, sinks + slots :] = x[:, sinks:].astype(dtype)
        sides.append(rows)
    for start, tier in zip(view.starts, view.tiers, strict=True):
        decoded = decode(tier.own(), Centers(*map(tier.of, view.centers)), dtype)
        here = slice(sinks + start, sinks + start + tier.slots)
        places = range(len(decoded.k)) if tier.heads is None else tier.heads.tolist()
        for rows, own in zip(sides, decoded, strict=True):
            for i, head in enumerate(places):
                rows[head, here] = own[i]
        mx.eval(sides)
    return Rows(*sides)


def working_copy(view: View, dtype: mx.Dtype, backend: Backend) -> Rows:
    """All tokens, decoded, in order and still rotated: [H, N, Dk] and [H, N, Dv].

    This is what a prefill attends over: a full-size copy of one layer, to be dropped as soon as its
    attention is done.
    """
    return gather(replace(view, rotations=None), dtype, backend)


def gather(view: View, dtype: mx.Dtype, backend: Backend) -> Rows:
    """The sink tokens, the tiers with all their slots (see `View.starts`), the window.

    Returns:
        Keys [H, N, Dk] and values [H, N, Dv] in `dtype`. If the view has rotations they are
        un-rotated, [H, N, head_dim]. Slots behind the length of a head are garbage.
    """
    return backend.gather(view, dtype)
