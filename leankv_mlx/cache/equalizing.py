"""Exact rows of a layer in the space of equalized keys, and back."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.space import Space
from leankv_mlx.kernels import Rows


def equalized(
    space: Space, exact: Rows, fitted: slice, squares: mx.array | None
) -> tuple[Space, Rows]:
    """The space with an equalizer, and the rows in it.

    Args:
        exact: [H, E, D], in `space`.
        fitted: which of them it is fitted on.
        squares: of the channels of the queries, if they are known, see `Equalizer.fit`.
    """
    rotation = space.rotations[0]
    keys = space.unscaled(rotation.undo(exact.k.astype(mx.float32)))
    space = replace(space, equalizer=Equalizer.fit(keys[:, fitted], squares))
    equal = rotation.apply(space.scaled(keys))
    return space, Rows(equal.astype(exact.k.dtype), exact.v)


def unequalized(space: Space, exact: Rows) -> tuple[Space, Rows]:
    """The space without one, and the rows, [H, E, D], in it."""
    plain = replace(space, equalizer=None)
    if space.equalizer and exact.k.shape[1]:
        keys, _ = space.undone(*exact)
        exact = Rows(plain.rotations[0].apply(plain.scaled(keys)), exact.v)
    return plain, exact
