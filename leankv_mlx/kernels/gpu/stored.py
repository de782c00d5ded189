"""What decode attention reads of the layers of one sequence, or of several: then their arrays end
to end, and where each begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from leankv_mlx.codec.format import Format
from leankv_mlx.kernels.gpu.launch import nothing
from leankv_mlx.kernels.types import Centers, Rows, Tier, View

MAX_POOLS = 8
"""Pools of a launch: Metal has room for 31 buffers, and a launch has up to 15 others."""

Column = Sequence[Tier | None]
"""Of each view the tier of one format; None where it has none."""


def groups(views: Sequence[View]) -> list[slice]:
    """Neighbours that launches take together: they have at most `MAX_POOLS` pools a format."""
    starts, pools = [0], set[tuple[int, ...]]()
    for i, view in enumerate(views):
        mine = tuple(id(tier.pool) for tier in view.tiers)
        if mine not in pools and len(pools) == MAX_POOLS:
            starts.append(i)
            pools.clear()
        pools.add(mine)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(views)], strict=True)]


@dataclass(frozen=True)
class Stored:
    """Layers of B sequences with H KV heads each.

    Attributes:
        views: of the sequences.
        centers: float32 [B * H, Dk] and [B * H, Dv], zeros where a sequence has none; None if none
            has any.
        exact: rows [H, E, D] of one sequence, of several [n, D] with those of each head together.
    """

    views: Sequence[View]
    centers: Centers | None
    exact: Rows

    @classmethod
    def of(cls, views: Sequence[View]) -> Stored:
        """What several sequences have is copied once for all launches; their codes are not."""
        if len(views) == 1:
            return cls(views, views[0].centers, views[0].exact)
        sides = zip(*(view.exact for view in views), strict=True)
        rows = ([x.flatten(0, 1) for x in side] for side in sides)
        exact = Rows(*(mx.concatenate(side) for side in rows))
        if all(view.centers is None for view in views):
            return cls(views, None, exact)
        centers = (view.centers or _zeros(view.exact) for view in views)
        pairs = zip(*centers, strict=True)
        return cls(views, Centers(*(mx.concatenate(list(side)) for side in pairs)), exact)

    def columns(self) -> list[Column]:
        """The tiers, those of a format together; without any tier one column of None."""
        found: dict[tuple[Format, int], list[Tier | None]] = {}
        for i, view in enumerate(self.views):
            formats = [tier.format for tier in view.tiers]
            for j, tier in enumerate(view.tiers):
                key = tier.format, formats[:j].count(tier.format)
                found.setdefault(key, [None] * len(self.views))[i] = tier
        return list(found.values()) or [[None] * len(self.views)]

    def inputs(self, column: Column) -> tuple[list[mx.array], list[mx.array]]:
        """The pools of a column, and what else a launch reads in the order of its inputs: table,
        lengths, centers, exact rows; of several sequences also their places."""
        pools, index = _alone(*column) if len(column) == 1 else self._together(column)
        none = nothing(mx.float32)
        table, lengths, *places = index
        others = [
            table,
            lengths,
            *(self.centers or (none, none)),
            *(x if x.size else nothing(x.dtype) for x in self.exact),
            *places,
        ]
        return pools, others

    def _together(self, column: Column) -> tuple[list[mx.array], list[mx.array]]:
        """Pools; table int32 [n], lengths int32 [B * H], places int32 [B, 5], see
        metal/places.metal."""
        heads = self.views[0].exact.k.shape[0]
        tiers = [tier for tier in column if tier]
        pools = list({id(tier.pool): tier.pool for tier in tiers}.values())
        numbers = {id(pool): i for i, pool in enumerate(pools)}
        places, ids, rows = [], 0, 0
        for view, tier in zip(self.views, column, strict=True):
            blocks = tier.table.shape[1] if tier else 0
            exact = view.exact.k.shape[1]
            places.append((ids, blocks, rows, exact, numbers[id(tier.pool)] if tier else 0))
            ids, rows = ids + heads * blocks, rows + heads * exact
        if not tiers:
            index = [nothing(mx.int32), nothing(mx.int32)]
            return [nothing(mx.uint32)], [*index, _places(tuple(places))]
        table = mx.concatenate([tier.table.flatten() for tier in tiers])
        lengths = [tier.lengths if tier else mx.zeros(heads, mx.int32) for tier in column]
        return _power_of_two(pools), [table, mx.concatenate(lengths), _places(tuple(places))]


def _alone(tier: Tier | None) -> tuple[list[mx.array], list[mx.array]]:
    if tier is None:
        return [nothing(mx.uint32)], [nothing(mx.int32), nothing(mx.int32)]
    return [tier.pool], [tier.table, tier.lengths]


def _zeros(exact: Rows) -> Centers:
    """Centers of a sequence without codes: the kernel multiplies them by the mass of no token."""
    return Centers(*(mx.zeros((x.shape[0], x.shape[2])) for x in exact))


def _power_of_two(pools: list[mx.array]) -> list[mx.array]:
    """So many, the last one again and again, so that few kernels are compiled."""
    size = 1 << (len(pools) - 1).bit_length()
    return pools + [pools[-1]] * (size - len(pools))


@lru_cache
def _places(places: tuple[tuple[int, ...], ...]) -> mx.array:
    """On the device. All layers of a step have the same, unless a policy gives them other sizes."""
    return mx.array(places, mx.int32)
