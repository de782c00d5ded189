"""The compressed tokens of one layer: one or two tiers of blocks for each share of its heads;
ragged per head once tokens were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.blocks import BlockPool, BlockTable
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.moves import Mask, in_front, plan_move, taken
from leankv_mlx.cache.state import TierState
from leankv_mlx.cache.tier import BodyTier, Encoded, Positions, Share, loose
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


@dataclass(frozen=True)
class Slots:
    """Every slot of every head, those of its high tier first; S is the most that a head has room
    for.

    Attributes:
        positions: int32 [H, S], -1 where a head has no such slot.
        scores: float32 [H, S].
        tiers: HIGH, LOW, or DROP where a head has no such slot, int8 [H, S].
    """

    positions: Positions
    scores: Scores
    tiers: NDArray[np.int8]


class CompressedBody:
    """The middle of a sequence, as codes.

    New tokens enter the high tier. As long as nothing has been dropped a head's slots are the
    tokens in order and nothing but codes is stored; `place` and `keep_below` make heads ragged,
    and from then on each slot's position and score are stored too.

    Once it is narrowed, heads whose codes keep other channels (see `codec.channels`) are stored in
    tiers of their own, and those that keep none hold nothing.

    Args:
        heads: KV heads.
        shares: those that hold anything, by their formats.
        centers: what is subtracted before encoding.
        first: position of the first token.
        rounding: how scales are found.
        backend: who computes.
        shaping: what errors of the keys cost, see `codec.shaping`; None if all cost the same.
    """

    def __init__(
        self,
        heads: int,
        shares: Sequence[Share],
        centers: Centers,
        first: int,
        rounding: Rounding,
        backend: Backend,
        shaping: mx.array | None = None,
    ) -> None:
        self._shaping = shaping
        self.centers = centers
        self._heads = heads
        self._first = first
        self._rounding: Rounding = rounding
        self._backend = backend
        self._hold([_empty(share, heads) for share in shares])

    def _hold(self, shares: list[list[BodyTier]]) -> None:
        """Consist of these tiers: of each share of the heads the high one, and a low one."""
        self._shares = shares
        self._tiers = [tier for share in shares for tier in share]
        self._apart = not shares or shares[0][0].table.among is not None

    @property
    def ragged(self) -> bool:
        """Whether heads may lack tokens, or are stored apart: then the tiers are not all tokens in
        order."""
        return self._apart or self._tiers[0].side is not None

    @property
    def lost(self) -> bool:
        """Whether heads may have lost tokens; positions are stored from then on."""
        return any(tier.side is not None for tier in self._tiers)

    @property
    def slots(self) -> int:
        """Stored tokens, over all heads and tiers."""
        return sum(int(tier.table.lengths.sum()) for tier in self._tiers)

    def holds(self, tokens: int) -> bool:
        """Whether every head that holds any has so many in its high tier."""
        return all((high.table.lengths == tokens).all() for high, *_ in self._shares)

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
            Stored(tier.view(), tier.positions(self._first)) for tier in self._tiers if tier.slots
        ]

    def append(self, rows: Rows, position: int, scores: Scores | None = None) -> None:
        """Add tokens to the high tier.

        Args:
            rows: rotated, [H, T, D], T a multiple of 32.
            position: of the first of them.
            scores: significance [H, T] if it is known; tokens without are kept until it is.
        """
        for tier, *_ in self._shares:
            own = Rows(*map(tier.of, rows))
            centers = self._centers_of(tier)
            blocks = self._encoded(own, centers, tier, tier.format)
            if tier.side is None:
                ids = tier.table.append(blocks.shape[1])
                tier.table.pool.write(ids.ravel(), blocks.reshape(-1, tier.format.words))
                continue
            shape = own.k.shape[:2]
            positions = np.broadcast_to(np.arange(position, position + shape[1]), shape)
            marks = np.full(shape, 255, np.uint8) if scores is None else marks_of(tier.of(scores))
            self._rewrite(tier, tier.used, _Extra(blocks, positions.astype(np.int32), marks))

    def last(self, tokens: int) -> Encoded | None:
        """The blocks of the last `tokens` that were appended, a multiple of 32; None once heads may
        have lost some."""
        if self.lost:
            return None
        return Encoded(tuple(high.table.last(tokens // TILE) for high, *_ in self._shares))

    def append_known(self, known: Encoded) -> bool:
        """Add tokens that a copy has encoded, see `last`; returns whether they can be shared."""
        highs = [high.table for high, *_ in self._shares]
        # Those of a copy that is not narrowed as this one is are in other pools.
        pools = [table.pool for table in highs] == [table.pool for table in known.tables]
        shared = not self.lost and pools
        if shared:
            for table, more in zip(highs, known.tables, strict=True):
                table.append_copies(more)
        return shared

    def describe(self) -> Slots:
        """Every slot on the host. Scores are those of the last `judge`, to within 5%."""
        width = max((_slots(share) for share in self._shares), default=0)
        shape = self._heads, width
        slots = Slots(
            np.full(shape, -1, np.int32),
            np.zeros(shape, np.float32),
            np.full(shape, DROP, np.int8),
        )
        for share in self._shares:
            start = 0
            for name, tier in zip((HIGH, LOW), share, strict=False):
                here = tier.rows, slice(start, start + tier.slots)
                slots.positions[here] = tier.positions(self._first)
                slots.scores[here] = scores_of(tier.recall()[1])
                slots.tiers[here] = np.where(tier.used, name, DROP)
                start += tier.slots
        return slots

    def place(self, plan: NDArray[np.int8], scores: Scores | None = None) -> None:
        """Move every slot to the tier that `plan` says, or drop it. Reads nothing but codes.

        Args:
            plan: HIGH, LOW or DROP, int8 [H, S], in the order of `describe`; a LOW slot never
                becomes HIGH. Without a low tier LOW means HIGH.
            scores: new significance [H, S]; None keeps what is stored.
        """
        self._open()
        for share in self._shares:
            own = None if scores is None else share[0].of(scores)
            self._place(share, share[0].of(plan)[:, : _slots(share)], own)

    def _place(self, share: list[BodyTier], plan: NDArray[np.int8], scores: Scores | None) -> None:
        """The same for heads that are stored alike."""
        if scores is not None:
            start = 0
            for tier in share:
                marks = marks_of(scores[:, start : start + tier.slots])
                tier.remember(tier.recall()[0][tier.used], marks[tier.used])
                start += tier.slots
        high, *lows = share
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
        for tier in self._tiers:
            self._rewrite(tier, tier.used & (tier.positions(self._first) < position))

    def narrow(self, shares: Sequence[Share]) -> None:
        """Give up what these shares of the heads do not keep, of a body of one share of all heads.
        What they keep is what it was, bit for bit."""
        (whole,) = self._shares
        self._hold(
            [
                [
                    tier.narrowed(f, share.among)
                    for tier, f in zip(whole, share.formats, strict=True)
                ]
                for share in shares
            ]
        )
        mx.eval([tier.table.pool.array for tier in self._tiers])  # what they come from can go

    def compact(self) -> None:
        """Hold no blocks in reserve."""
        for tier in self._tiers:
            tier.table.pool.compact()

    def copy(self) -> CompressedBody:
        """A body that shares the blocks until one of the two changes them."""
        other = CompressedBody(
            self._heads, (), self.centers, self._first, self._rounding, self._backend, self._shaping
        )
        other._hold(
            [[BodyTier(t.format, t.table.copy(), t.side) for t in share] for share in self._shares]
        )
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

    def slot_nbytes(self, tokens: int) -> NDArray[np.float64]:
        """Bytes of a slot of each head in the high and in the low tier, [2, H], in a sequence of
        `tokens`; 0 for heads that hold nothing."""
        side = np.min_scalar_type(tokens).itemsize + 1
        prices = np.zeros((2, self._heads))
        for share in self._shares:
            own = [(4 * tier.format.words + 4) / TILE + side for tier in share]
            prices[:, share[0].rows] = [[own[0]], [own[-1]]]
        return prices

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
            ids, lengths = tier.of(np.array(found.ids)), tier.of(np.array(found.lengths))
            owned = ids[np.arange(ids.shape[1]) < -(-lengths // TILE)[:, None]]
            pool = BlockPool.holding(found.blocks, owned)
            tier.table = BlockTable.holding(pool, ids, lengths, tier.table.among)
            ragged = found.positions is not None
            tier.side = (np.array(found.positions), np.array(found.marks)) if ragged else None

    def _open(self) -> None:
        """Store positions and marks from now on."""
        for tier in self._tiers:
            if tier.side is None:
                held = tier.positions(self._first)[tier.used]
                tier.remember(held, np.full(held.shape, 255, np.uint8))
                tier.table.pool.compact()  # that of a prompt has room to grow

    def _encoded_again(self, tier: BodyTier, format: Format, chosen: Mask) -> _Extra:
        """Slots of a tier in another format, without anything but their codes."""
        index, _ = in_front(chosen)
        index = np.pad(index, ((0, 0), (0, -index.shape[1] % TILE)), constant_values=-1)
        parts = []
        view, centers = tier.view().own(), self._centers_of(tier)
        for start in range(0, index.shape[1], TILE * _SLAB):
            picked = repack(view, mx.array(index[:, start : start + TILE * _SLAB]), self._backend)
            body = loose(picked, tier.format)
            rows = dequantize(body, centers, mx.float32, self._backend)
            parts.append(self._encoded(rows, centers, tier, format))
        blocks = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        positions, marks = (taken(x, index, index >= 0) for x in tier.recall())
        return _Extra(blocks, np.where(index >= 0, positions, -1), marks)

    def _encoded(self, rows: Rows, centers: Centers, tier: BodyTier, format: Format) -> mx.array:
        """Rows of the heads of a tier as blocks."""
        shaping = None if self._shaping is None else tier.of(self._shaping)
        return encode(rows, centers, format, self._rounding, self._backend, shaping)

    def _centers_of(self, tier: BodyTier) -> Centers:
        return Centers(*map(tier.of, self.centers))

    def _rewrite(self, tier: BodyTier, keep: Mask, extra: _Extra | None = None) -> None:
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
            blocks = repack(loose(blocks, tier.format), picked, self._backend)
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
    def nothing(cls, tier: BodyTier) -> _Extra:
        none = np.zeros((tier.table.heads, 0), np.int32)
        return cls(tier.at(none), none, none.astype(np.uint8))


def _slots(share: Sequence[BodyTier]) -> int:
    """Those that a head has room for."""
    return sum(tier.slots for tier in share)


def _empty(share: Share, heads: int) -> list[BodyTier]:
    """The tiers of a share of so many KV heads."""
    own, among = share.heads(heads), share.among
    return [BodyTier(f, BlockTable(BlockPool(f.words), own, among)) for f in share.formats]
