"""Which blocks of a pool hold the slots of one sequence, head by head."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.blocks.pool import BlockPool
from leankv_mlx.codec.format import TILE


@dataclass(frozen=True, eq=False)
class Among:
    """Those of a layer's KV heads that a table is of.

    Attributes:
        heads: their numbers, ascending, [H].
        of: KV heads of the layer.
    """

    heads: NDArray[np.intp]
    of: int

    def spread(self, rows: np.ndarray) -> np.ndarray:
        """A row for each head of the layer, those of others 0."""
        spread = np.zeros((self.of, *rows.shape[1:]), rows.dtype)
        spread[self.heads] = rows
        return spread


class BlockTable:
    """Block ids int32 [H, M] and lengths int32 [H] in slots, for one sequence and tier.

    Heads are ragged: head h owns the first ceil(lengths[h] / 32) entries of its row; the rest
    are 0. The table holds a reference to each of its blocks and gives them back when it dies.

    Args:
        among: which heads of the layer they are; None for all of them.
    """

    def __init__(self, pool: BlockPool, heads: int, among: Among | None = None) -> None:
        self.pool = pool
        self.among = among
        self._ids = np.zeros((heads, 0), np.int32)
        self._lengths = np.zeros(heads, np.int32)
        self._arrays: tuple[int, mx.array, mx.array] | None = None  # and the moves they are of
        self._full: bool | None = None  # None if it was not asked for
        self._owned = [np.zeros(0, np.int32)]  # a list, which the finalizer holds
        self._finalizer = self._finalize()

    @classmethod
    def holding(
        cls, pool: BlockPool, ids: np.ndarray, lengths: np.ndarray, among: Among | None = None
    ) -> "BlockTable":
        """A table of blocks whose references the caller hands over."""
        table = cls(pool, len(lengths), among)
        table._set(ids.astype(np.int32), lengths.astype(np.int32))
        return table

    @property
    def heads(self) -> int:
        """H."""
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Slots in use, int32 [H]."""
        return self._lengths

    @property
    def ids(self) -> np.ndarray:
        """Block ids, int32 [H, M]."""
        return self._ids

    @property
    def full(self) -> bool:
        """Whether every head has as many slots as the longest, and ends with a full block."""
        if self._full is None:
            self._full = bool((self._lengths == TILE * self._ids.shape[1]).all())
        return self._full

    @property
    def owned(self) -> np.ndarray:
        """Ids of its blocks, head by head, int32 [n]."""
        return self._owned[0]

    @property
    def blocks(self) -> int:
        """Blocks owned."""
        return len(self.owned)

    @property
    def nbytes(self) -> int:
        """Bytes of the table on the device."""
        rows = self.heads if self.among is None else self.among.of
        return 4 * rows * (self._ids.shape[1] + 1)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the pool, without the blocks in use that are others' alone."""
        others = self.pool.used - self.blocks
        return (self.pool.capacity - others) * self.pool.block_nbytes

    def arrays(self) -> tuple[mx.array, mx.array]:
        """(places of its blocks in the pool's array int32 [H, M], lengths int32 [H]) on the device,
        for all KV heads of the layer; uploaded after a change only."""
        if self._arrays is None or self._arrays[0] != self.pool.moves:
            places, lengths = np.zeros_like(self._ids), self._lengths
            mask = _owned_mask(self._ids.shape[1], lengths)
            places[mask] = self.pool.places(self.owned)
            if self.among is not None:
                places, lengths = self.among.spread(places), self.among.spread(lengths)
            self._arrays = self.pool.moves, mx.array(places), mx.array(lengths)
        return self._arrays[1:]

    def append(self, blocks: int) -> np.ndarray:
        """Give every head `blocks` more full blocks: their ids, int32 [H, blocks].

        Raises:
            ValueError: a head ends inside a block.
        """
        fresh = self.pool.allocate(self.heads * blocks).reshape(self.heads, blocks)
        self._extend(fresh)
        return fresh

    def append_copies(self, other: "BlockTable") -> None:
        """Give every head the blocks of a full table of the same pool, too; none is copied.

        Raises:
            ValueError: a head ends inside a block.
        """
        self.pool.retain(other.owned)
        self._extend(other.ids)

    def last(self, blocks: int) -> "BlockTable":
        """A table of the last `blocks` blocks of each head, which are full; none is copied."""
        ends = self._lengths[:, None] // TILE
        ids = np.take_along_axis(self._ids, ends - blocks + np.arange(blocks), axis=1)
        self.pool.retain(ids.ravel())
        lengths = np.full(self.heads, TILE * blocks, np.int32)
        return BlockTable.holding(self.pool, ids, lengths, self.among)

    def _extend(self, more: np.ndarray) -> None:
        """Own full blocks [H, n] behind its own."""
        if (self._lengths % TILE).any():
            raise ValueError("[BlockTable.append] expected heads that end with a full block.")
        used, blocks = self._lengths // TILE, more.shape[1]
        ids = np.pad(self._ids, ((0, 0), (0, int(used.max()) + blocks - self._ids.shape[1])))
        np.put_along_axis(ids, used[:, None] + np.arange(blocks), more, axis=1)
        self._set(ids, self._lengths + TILE * blocks)

    def truncate(self, lengths: np.ndarray) -> None:
        """Keep the first `lengths` [H] slots of each head and release the blocks behind them."""
        self._keep(lengths)
        if self.pool.wasteful:
            self.pool.compact()

    def parts(
        self, heads: NDArray[np.intp], words: Sequence[slice], among: Among | None
    ) -> "BlockTable":
        """A table of some of its heads and of the same slots, whose blocks are these parts of its
        own side by side, in a pool just as large as they are. Its own blocks are left alone.

        Args:
            heads: which of its rows.
            words: of a block, those that are taken.
            among: which heads of the layer they are; None for all of them.
        """
        lengths = self._lengths[heads]
        ids = self._ids[heads][:, : int(_blocks(lengths).max(initial=0))]
        used = _owned_mask(ids.shape[1], lengths)
        places = mx.array(self.pool.places(ids[used]))
        array = mx.concatenate([self.pool.array[:, part][places] for part in words], axis=1)
        fresh = np.arange(len(places), dtype=np.int32)
        own = np.zeros_like(ids)
        own[used] = fresh
        return BlockTable.holding(BlockPool.holding(array, fresh), own, lengths, among)

    def replace_tails(self, fixed: np.ndarray, slots: np.ndarray, blocks: mx.array) -> None:
        """Keep the first `fixed` [H] blocks of each head and continue with new ones.

        Args:
            fixed: full blocks that stay, at most what a head owns.
            slots: slots of each head behind them, [H].
            blocks: their content, uint32 [H, B, words], B at least what the longest head needs.
        """
        needed = _blocks(slots)
        picked = np.flatnonzero(np.arange(blocks.shape[1]) < needed[:, None])
        content = blocks.reshape(-1, blocks.shape[2])
        content = content[mx.array(picked.astype(np.int32))] if len(picked) else content[:0]
        self._keep(TILE * fixed)  # what goes is still in the array that `blocks` come from
        if not fixed.any():  # a pool of its own, as large as it has to be
            fresh = np.arange(len(picked), dtype=np.int32)
            self._move(BlockPool.holding(content, fresh))
        else:
            fresh = self.pool.allocate(len(picked), spare=False)
            if len(fresh):
                self.pool.write(fresh, content)
        width = int((fixed + needed).max(initial=0))
        ids = np.zeros((self.heads, width), np.int32)
        column = np.arange(width)
        here = column < fixed[:, None]
        ids[here] = self.owned
        ids[~here & (column < (fixed + needed)[:, None])] = fresh
        self._set(ids, (TILE * fixed + slots).astype(np.int32))
        if self.pool.wasteful:
            self.pool.compact()

    def copy(self) -> "BlockTable":
        """A table of the same blocks, each with one more reference; no block is copied."""
        self.pool.retain(self.owned)
        return BlockTable.holding(self.pool, self._ids, self._lengths, self.among)

    def _keep(self, lengths: np.ndarray) -> None:
        """Own no more than the blocks of the first `lengths` [H] slots of each head."""
        keep = _owned_mask(self._ids.shape[1], lengths)
        dropped = self._ids[_owned_mask(self._ids.shape[1], self._lengths) & ~keep]
        width = int(_blocks(lengths).max(initial=0))
        self._set(np.where(keep, self._ids, 0)[:, :width], lengths.astype(np.int32))
        self.pool.release(dropped)

    def _move(self, pool: BlockPool) -> None:
        """Take another pool; the table owns nothing of the old one."""
        self.pool = pool
        self._finalizer.detach()
        self._finalizer = self._finalize()

    def _finalize(self) -> weakref.finalize:  # type: ignore[type-arg]
        """Give the blocks back when the table dies. Must not hold the table itself."""
        finalizer = weakref.finalize(self, _give_back, self.pool, self._owned)
        finalizer.atexit = False
        return finalizer

    def _set(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self._ids, self._lengths, self._arrays, self._full = ids, lengths, None, None
        self._owned[0] = ids[_owned_mask(ids.shape[1], lengths)]


def _blocks(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // TILE)


def _owned_mask(width: int, lengths: np.ndarray) -> np.ndarray:
    """bool [H, width]: the entries of a table that are in use."""
    mask: np.ndarray = np.arange(width) < _blocks(lengths)[:, None]
    return mask


def _give_back(pool: BlockPool, owned: list[np.ndarray]) -> None:
    pool.give_back(owned[0])
