"""Which slots of a tier go where when it is rewritten: index arithmetic alone.

A tier has a list of blocks for each head, of which the last may be partly filled. Some of its
slots stay, others go, and slots in blocks of their own come. Afterwards a head has the slots that
stay and behind them those that came, both in their order. Full blocks before the first slot that
goes are left where they are; the slots behind them are gathered into new blocks, since a block may
be shared and is never written.

One head with blocks of 4 slots, which hold the tokens a to j; f and i go, x and y come:

    blocks      a b c d    e f g h    i j . .          coming    x y . .
    keep        1 1 1 1    1 0 1 1    0 1 . .          comes     1 1 0 0
    loose                  0 1 2 3    4 5 6 7                    8 9 . .
    afterwards  a b c d    e g h j    x y . .

>>> keep = np.array([[1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0]], bool)
>>> comes = np.array([[1, 1, 0, 0]], bool)
>>> move = plan_move(np.array([10], np.int32), keep, comes, block=4)
>>> move.fixed  # the block of a b c d is left alone
array([1])
>>> move.behind  # the blocks that are read: their slots, and then those that come, are loose
array([[1, 2]])
>>> move.picked  # e g h j x y, by their numbers among the loose slots
array([[0, 2, 3, 5, 8, 9]], dtype=int32)
>>> move.counts
array([6], dtype=int32)

What else is known of each slot is `np.concatenate([old, new], axis=1)[move.order]`, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.format import TILE

Index = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Move:
    """How the blocks of a tier are made anew.

    Attributes:
        fixed: full blocks of each head that are left where they are, [H].
        behind: columns of the table with the blocks behind those, [H, B]; a head that has fewer
            repeats its last column.
        picked: of each head's loose slots (those of the blocks `behind` and then those that come),
            the ones that go into its new blocks, [H, T]; -1 behind a head's last.
        counts: how many they are, [H].
        order: of the old slots and then those that come, the ones that there are afterwards,
            bool [H, S + C]: row by row that is their order.
    """

    fixed: NDArray[Any]
    behind: NDArray[Any]
    picked: Index
    counts: Index
    order: Mask


def plan_move(lengths: Index, keep: Mask, comes: Mask, block: int = TILE) -> Move:
    """Plan how a tier is rewritten.

    Args:
        lengths: slots of each head, [H].
        keep: which of them stay, [H, S], S a multiple of `block`; False where a head has none.
        comes: which slots of the blocks that come are tokens, [H, C], C a multiple of `block`.
        block: slots of a block.
    """
    fixed = np.logical_and.accumulate(keep, axis=1).sum(axis=1) // block
    width = int((-(-lengths // block) - fixed).max(initial=0))
    behind = np.minimum(fixed[:, None] + np.arange(width), keep.shape[1] // block - 1)
    slots = fixed[:, None] * block + np.arange(width * block)
    stays = taken(keep, slots, slots < lengths[:, None])
    picked, counts = in_front(np.concatenate([stays, comes], axis=1))
    return Move(fixed, behind, picked, counts, np.concatenate([keep, comes], axis=1))


def in_front(chosen: Mask) -> tuple[Index, Index]:
    """Indices of the chosen columns of each row in order, [H, most], -1 behind them; and how many
    they are, [H]."""
    counts = chosen.sum(axis=1, dtype=np.int32)
    index = np.full((len(chosen), int(counts.max(initial=0))), -1, np.int32)
    index[np.arange(index.shape[1]) < counts[:, None]] = np.nonzero(chosen)[1]
    return index, counts


def taken(x: NDArray[Any], index: NDArray[Any], there: Mask) -> NDArray[Any]:
    """The entries of each row at `index` [H, T] where they are `there`; 0 elsewhere."""
    found = np.zeros(index.shape, x.dtype)
    row, _ = np.nonzero(there)
    found[there] = x[row, index[there]]
    return found
