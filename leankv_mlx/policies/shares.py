"""The arithmetic of policies: ranks of slots, and how many of them heads get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.policies.policy import DROP, HIGH, LOW
from leankv_mlx.settings import BLOCK_SLOTS

if TYPE_CHECKING:
    from leankv_mlx.policies.policy import Scores, Tiers

FLOOR = 0.2
"""Share of an equal share of the budget that every head gets, so that none goes blind."""


def not_above(present: Tiers, wanted: NDArray[np.int_]) -> Tiers:
    """The wanted tiers [H, S], except where that is above the present one: int8 [H, S]."""
    lower = np.where((present == LOW) & (wanted == HIGH), LOW, wanted)
    return np.where(present == DROP, DROP, lower).astype(np.int8)


def ranks_in_rows(scores: Scores) -> NDArray[np.int64]:
    """Rank of every slot in its head, 0 for the highest score; earlier slots win ties."""
    order = descending(scores)
    ranks = np.empty(scores.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None].repeat(len(scores), 0), 1)
    return ranks


def descending(scores: Scores) -> NDArray[np.int64]:
    """Indices that sort the last axis from high to low, earlier ones first among equals.

    What a stable argsort gives, but NumPy sorts 16-bit numbers by radix, several times faster: one
    pass for scores that come from marks, whose lower half is zero, and two for others.

    Args:
        scores: at least 0, or -inf.
    """
    bits = np.uint32(0x7F800000) - np.abs(scores).view(np.uint32)  # of floats, ordered as they are
    keys = np.where(np.isfinite(scores), bits, np.uint32(0x7F810000))
    upper, lower = (keys >> np.uint32(16)).astype(np.uint16), keys.astype(np.uint16)
    if not lower.any():
        return np.argsort(upper, axis=-1, kind="stable")
    order = np.argsort(lower, axis=-1, kind="stable")
    again = np.argsort(np.take_along_axis(upper, order, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(order, again, axis=-1)


def slots_per_head(scores: Scores, price: NDArray[np.float64], room: float) -> NDArray[np.int64]:
    """How many of its best slots each head keeps of what `room` bytes hold: whole blocks.

    The shares follow the ranking of all slots; the floor is taken off the others in proportion,
    and bytes that rounding down leaves over go to the largest remainders.

    Args:
        scores: [H, S]; -inf for slots that do not compete.
        price: bytes of a slot of each head, [H].
        room: bytes.
    """
    heads, width = scores.shape
    present = np.isfinite(scores)
    available = present.sum(axis=1)
    blocks_available = -(-available // BLOCK_SLOTS)
    if float((blocks_available * BLOCK_SLOTS * price).sum()) <= room:
        return np.asarray(blocks_available * BLOCK_SLOTS)
    order = descending(scores.ravel())[: int(available.sum())]
    owner = order // width
    affordable = np.cumsum(price[owner]) <= room
    share = np.bincount(owner[affordable], minlength=heads).astype(np.float64)
    least = np.minimum(FLOOR * room / max(float(price.sum()), 1e-9), available)
    above = np.maximum(share - least, 0)
    spare = max(0.0, room - float((least * price).sum()))
    share = least + above * min(1.0, spare / max(float((above * price).sum()), 1e-9))
    whole = np.minimum(np.floor(share / BLOCK_SLOTS + 1e-9), blocks_available)
    remainder = np.where(whole < blocks_available, share / BLOCK_SLOTS - whole, -1.0)
    by_remainder = np.argsort(-remainder, kind="stable")
    left = room - float((whole * BLOCK_SLOTS * price).sum())
    extra = (np.cumsum(BLOCK_SLOTS * price[by_remainder]) <= left) & (remainder[by_remainder] >= 0)
    whole[by_remainder[extra]] += 1
    return np.asarray(whole * BLOCK_SLOTS, np.int64)
