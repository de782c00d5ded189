"""The compressed tokens of one layer: one or two tiers of blocks, ragged per head once tokens were
dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.blocks import BlockPool, BlockTable
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.moves import Mask, in_front, plan_move, taken
from leankv_mlx.cache.state import TierState
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import Rounding
from leankv_mlx.kernels import Backend, Centers, Rows, Tier
from leankv_mlx.kernels.dequantize import dequantize
from leankv_mlx.kernels.encode import encode
from leankv_mlx.kernels.repack import repack
from leankv_mlx.policies import DROP, HIGH, LOW
from leankv_mlx.sparsity import Stored
from leankv_mlx.sparsity.marks import Marks, Scores, marks_of, scores_of

_SLAB = 64
"""Blocks that change their tier at a time: bounds what is decoded at once."""

Positions = NDArray[np.int32]


@dataclass(frozen=True)
class Slots:
    """Every slot of every tier, the high tier's first; S is the slots of their widest heads.

    Attributes:
        positions: int32 [H, S], -1 where a head has no such slot.
        scores: float32 [H, S].
        tiers: HIGH, LOW, or DROP where a head has no such slot, int8 [H, S].
    """

    positions: Positions
    scores: Scores
    tiers: NDArray[np.int8]


@dataclass
class _Tier:
    """Blocks of one format, and what is known of each slot beside its codes.

    Attributes:
        side: positions, as the smallest unsigned integers that hold them, and marks, uint8, see
            `sparsity.marks`; of the used slots alone, head by head, because one head may be many
            times as long as the others. None while every head has every token in order.
    """

    format: Format
    table: BlockTable
    side: tuple[NDArray[Any], Marks] | None = None

    @property
    def slots(self) -> int:
        return TILE * int(self.table.ids.shape[1])

    @property
    def used(self) -> Mask:
        """bool [H, S]."""
        mask: Mask = np.arange(self.slots) < self.table.lengths[:, None]
        return mask

    def remember(self, positions: Positions, marks: Marks) -> None:
        """Make side data of what is known of the used slots, head by head."""
        kind = np.min_scalar_type(int(positions.max(initial=0)))
        self.side = positions.astype(kind), marks

    def recall(self) -> tuple[Positions, Marks]:
        """The side data for all slots, [H, S]; -1 and 0 where there is no token."""
        used = self.used
        positions, marks = np.full(used.shape, -1, np.int32), np.zeros(used.shape, np.uint8)
        if self.side is not None:
            positions[used], marks[used] = self.side
        return positions, marks

    @property
    def nbytes(self) -> int:
        """Bytes of the side data."""
        return sum(x.nbytes for x in self.side) if self.side else 0

    def at(self, columns: NDArray[Any]) -> mx.array:
        """Blocks [H, B, words] at these columns of the table, [H, B]."""
        if not columns.size:
            return mx.zeros((*columns.shape, self.format.words), mx.uint32)
        pool, ids = self.table.pool, np.take_along_axis(self.table.ids, columns, axis=1)
        return pool.array[mx.array(pool.places(ids))]

    def view(self) -> Tier:
        table = self.table
        return Tier(table.pool.array, *table.arrays(), self.format, table.full)


class CompressedBody:
    """The middle of a sequence, as codes.

    New tokens enter the high tier. As long as nothing has been dropped a head's slots are the
    tokens in order and nothing but codes is stored; `place` and `keep_below` make heads ragged,
    and from then on each slot's position and score are stored too.

    Args:
        heads: KV heads.
        formats: of the high tier, and of the low one if there is one.
        centers: what is subtracted before encoding.
        first: position of the first token.
        rounding: how scales are found.
        backend: who computes.
    """

    def __init__(
        self,
        heads: int,
        formats: Sequence[Format],
        centers: Centers,
        first: int,
        rounding: Rounding,
        backend: Backend,
    ) -> None:
        self.centers = centers
        self._first = first
        self._rounding: Rounding = rounding
        self._backend = backend
        self._tiers = [_Tier(f, BlockTable(BlockPool(f.words), heads)) for f in formats]

    @property
    def ragged(self) -> bool:
        """Whether heads may have lost tokens."""
        return self._tiers[0].side is not None

    @property
    def slots(self) -> int:
        """Stored tokens, over all heads and tiers."""
        return sum(int(tier.table.lengths.sum()) for tier in self._tiers)

    @property
    def tables(self) -> list[BlockTable]:
        """Who owns which block, tier by tier."""
        return [tier.table for tier in self._tiers]

    def views(self) -> list[Tier]:
        """The tiers that hold anything, as attention sees them."""
        return [tier.view() for tier in self._tiers if tier.slots]

    def stored(self) -> list[Stored]:
        """The same with the positions of their slots."""
        return [
            Stored(tier.view(), positions)
            for tier, positions in zip(self._tiers, self._positions(), strict=True)
            if tier.slots
        ]

    def append(self, rows: Rows, position: int, scores: Scores | None = None) -> None:
        """Add tokens to the high tier.

        Args:
            rows: rotated, [H, T, D], T a multiple of 32.
            position: of the first of them.
            scores: significance [H, T] if it is known; tokens without are kept until it is.
        """
        blocks = encode(rows, self.centers, self._tiers[0].format, self._rounding, self._backend)
        tier = self._tiers[0]
        if tier.side is None:
            ids = tier.table.append(blocks.shape[1])
            tier.table.pool.write(ids.ravel(), blocks.reshape(-1, tier.format.words))
            return
        shape = rows.k.shape[:2]
        positions = np.broadcast_to(np.arange(position, position + shape[1]), shape)
        marks = np.full(shape, 255, np.uint8) if scores is None else marks_of(scores)
        self._rewrite(tier, tier.used, _Extra(blocks, positions.astype(np.int32), marks))

    def last(self, tokens: int) -> BlockTable | None:
        """The blocks of the last `tokens` that were appended, a multiple of 32; None once heads may
        have lost some."""
        return None if self.ragged else self._tiers[0].table.last(tokens // TILE)

    def append_known(self, blocks: BlockTable) -> bool:
        """Add tokens that a copy has encoded, see `last`; returns whether they can be shared."""
        table = self._tiers[0].table
        shared = not self.ragged and blocks.pool is table.pool
        if shared:
            table.append_copies(blocks)
        return shared

    def describe(self) -> Slots:
        """Every slot on the host. Scores are those of the last `judge`, to within 5%."""
        tiers = [
            np.where(tier.used, name, DROP).astype(np.int8)
            for name, tier in zip((HIGH, LOW), self._tiers, strict=False)
        ]
        scores = [scores_of(tier.recall()[1]) for tier in self._tiers]
        return Slots(
            np.concatenate(self._positions(), axis=1),
            np.concatenate(scores, axis=1),
            np.concatenate(tiers, axis=1),
        )

    def place(self, plan: NDArray[np.int8], scores: Scores | None = None) -> None:
        """Move every slot to the tier that `plan` says, or drop it. Reads nothing but codes.

        Args:
            plan: HIGH, LOW or DROP, int8 [H, S], in the order of `describe`; a LOW slot never
                becomes HIGH. Without a low tier LOW means HIGH.
            scores: new significance [H, S]; None keeps what is stored.
        """
        self._open()
        if scores is not None:
            start = 0
            for tier in self._tiers:
                marks = marks_of(scores[:, start : start + tier.slots])
                tier.remember(tier.recall()[0][tier.used], marks[tier.used])
                start += tier.slots
        high, *lows = self._tiers
        of_high, of_low = plan[:, : high.slots], plan[:, high.slots :]
        if not lows:
            self._rewrite(high, high.used & (of_high != DROP))
            return
        demoted = high.used & (of_high == LOW)
        extra = self._encoded_again(high, lows[0].format, demoted) if demoted.any() else None
        self._rewrite(lows[0], lows[0].used & (of_low == LOW), extra)
        self._rewrite(high, high.used & (of_high == HIGH))

    def rows(self, block: int, dtype: mx.Dtype) -> Rows:
        """Decoded tokens of one block of each head, [H, 32, D], while the body is not ragged."""
        view = self._tiers[0].view()
        part = replace(view, table=view.table[:, block : block + 1], full=True)
        return dequantize(part, self.centers, dtype, self._backend)

    def cut(self, tokens: int) -> None:
        """Keep the first `tokens`, a multiple of 32, while the body is not ragged."""
        table = self._tiers[0].table
        table.truncate(np.full(table.heads, tokens, np.int32))

    def keep_below(self, position: int) -> None:
        """Drop all tokens that stand at `position` or later."""
        self._open()
        for tier, positions in zip(self._tiers, self._positions(), strict=True):
            self._rewrite(tier, tier.used & (positions < position))

    def compact(self) -> None:
        """Hold no blocks in reserve."""
        for tier in self._tiers:
            tier.table.pool.compact()

    def copy(self) -> CompressedBody:
        """A body that shares the blocks until one of the two changes them."""
        other = CompressedBody(
            0, [t.format for t in self._tiers], self.centers, self._first, self._rounding,
            self._backend,
        )  # fmt: skip
        other._tiers = [_Tier(t.format, t.table.copy(), t.side) for t in self._tiers]
        return other

    def memory(self) -> CacheMemory:
        """Bytes, counted from the buffers."""
        found = [t.table for t in self._tiers]
        scales = sum(table.blocks for table in found) * TILE * 4
        tables = sum(t.table.nbytes for t in self._tiers if t.slots)
        side = sum(t.nbytes for t in self._tiers)
        return CacheMemory(
            codes=sum(table.blocks * table.pool.block_nbytes for table in found) - scales,
            scales=scales,
            tables=tables,
            side=side,
            allocated=sum(table.allocated_nbytes for table in found) + tables + side,
        )

    def slot_nbytes(self, tokens: int) -> tuple[float, float]:
        """Bytes of a slot of the high and of the low tier in a sequence of `tokens`."""
        side = np.min_scalar_type(tokens).itemsize + 1
        prices = [(4 * tier.format.words + 4) / TILE + side for tier in self._tiers]
        return prices[0], prices[-1]

    @property
    def state(self) -> list[TierState]:
        """Of each tier."""
        return [
            TierState(t.table.pool.array, *t.table.arrays(), *map(mx.array, t.side or ()))
            for t in self._tiers
        ]

    def restore(self, state: Sequence[TierState]) -> None:
        """Become what `state` said."""
        for tier, found in zip(self._tiers, state, strict=True):
            ids, lengths = np.array(found.ids), np.array(found.lengths)
            owned = ids[np.arange(ids.shape[1]) < -(-lengths // TILE)[:, None]]
            tier.table = BlockTable.holding(BlockPool.holding(found.blocks, owned), ids, lengths)
            ragged = found.positions is not None
            tier.side = (np.array(found.positions), np.array(found.marks)) if ragged else None

    def _positions(self) -> list[Positions]:
        """Of each tier, int32 [H, S]."""
        return [
            tier.recall()[0] if tier.side else
            np.where(tier.used, np.arange(tier.slots, dtype=np.int32) + self._first, np.int32(-1))
            for tier in self._tiers
        ]  # fmt: skip

    def _open(self) -> None:
        """Store positions and marks from now on."""
        for tier, positions in zip(self._tiers, self._positions(), strict=True):
            if tier.side is None:
                held = positions[tier.used]
                tier.remember(held, np.full(held.shape, 255, np.uint8))
                tier.table.pool.compact()  # that of a prompt has room to grow

    def _encoded_again(self, tier: _Tier, format: Format, chosen: Mask) -> _Extra:
        """Slots of a tier in another format, without anything but their codes."""
        index, _ = in_front(chosen)
        index = np.pad(index, ((0, 0), (0, -index.shape[1] % TILE)), constant_values=-1)
        parts = []
        view = tier.view()
        for start in range(0, index.shape[1], TILE * _SLAB):
            picked = repack(view, mx.array(index[:, start : start + TILE * _SLAB]), self._backend)
            body = _loose(picked, tier.format)
            rows = dequantize(body, self.centers, mx.float32, self._backend)
            parts.append(encode(rows, self.centers, format, self._rounding, self._backend))
        blocks = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        positions, marks = (taken(x, index, index >= 0) for x in tier.recall())
        return _Extra(blocks, np.where(index >= 0, positions, -1), marks)

    def _rewrite(self, tier: _Tier, keep: Mask, extra: _Extra | None = None) -> None:
        """Keep some slots of a tier and put others behind them, see `cache.moves`."""
        if extra is None:
            if not (tier.used & ~keep).any():
                return
            extra = _Extra.nothing(tier)
        move = plan_move(tier.table.lengths, keep, extra.positions >= 0)
        blocks = tier.at(move.behind)
        if extra.blocks.size:
            blocks = mx.concatenate([blocks, extra.blocks], axis=1)
        if move.picked.shape[1]:
            picked = mx.array(move.picked)
            blocks = repack(_loose(blocks, tier.format), picked, self._backend)
        positions, marks = (
            np.concatenate([old, new], axis=1)[move.order]
            for old, new in zip(tier.recall(), (extra.positions, extra.marks), strict=True)
        )
        tier.table.replace_tails(move.fixed, move.counts, blocks)
        tier.remember(positions, marks)


@dataclass(frozen=True)
class _Extra:
    """Slots that come to a tier: blocks [H, B, words], positions int32 [H, B * 32] (-1: none) and
    marks uint8 [H, B * 32]."""

    blocks: mx.array
    positions: Positions
    marks: Marks

    @classmethod
    def nothing(cls, tier: _Tier) -> _Extra:
        none = np.zeros((tier.table.heads, 0), np.int32)
        return cls(tier.at(none), none, none.astype(np.uint8))


def _loose(blocks: mx.array, format: Format) -> Tier:
    """A body of blocks [H, M, words] that belong to no pool."""
    heads, columns, words = blocks.shape
    table = mx.arange(heads * columns, dtype=mx.int32).reshape(heads, columns)
    lengths = mx.full((heads,), columns * TILE, mx.int32)
    return Tier(blocks.reshape(-1, words), table, lengths, format, True)
