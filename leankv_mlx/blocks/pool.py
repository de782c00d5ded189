"""A growing array of equal blocks with reference counts."""

import mlx.core as mx
import numpy as np

GROWTH_STEP = 32
"""Blocks by which a pool grows at least."""
SLACK = 8
"""A growing pool takes 1/SLACK more blocks than it needs, so that growing is rare."""


class BlockPool:
    """Blocks of one format of a layer, for a sequence and its copies, in one array.

    MLX updates an array in place only while nothing else holds it. Arrays of different layers would
    hold each other's, and a step that is on its way holds all that it reads: with one pool for all
    sequences nearly every write would copy the blocks of all of them.

    A block keeps its id for life; its place in the array changes when the pool is compacted. One
    with a reference count of 0 is free. Copies of a cache share the pool and count. A pool belongs
    to the thread that computes; only `give_back` may be called by any other.

    Attributes:
        array: uint32 [capacity, words].
        moves: how often blocks have got other places.
    """

    def __init__(self, words: int) -> None:
        self.array = mx.zeros((0, words), mx.uint32)
        self.moves = 0
        self._references = np.zeros(0, np.int32)  # by id
        self._places = np.zeros(0, np.int32)  # by id; those of free ones say nothing
        self._given_back: list[np.ndarray] = []  # and not yet subtracted

    @classmethod
    def holding(cls, array: mx.array, ids: np.ndarray) -> "BlockPool":
        """A pool around an existing array of which the blocks `ids` are in use once each."""
        pool = cls(array.shape[1])
        if array.shape[0]:  # what has no rows is never computed, and would keep what it came from
            pool.array = array
        pool._references = np.bincount(ids.ravel(), minlength=array.shape[0]).astype(np.int32)
        pool._places = np.arange(array.shape[0], dtype=np.int32)
        return pool

    @property
    def words(self) -> int:
        """uint32 words of a block."""
        return int(self.array.shape[1])

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block."""
        return 4 * self.words

    @property
    def capacity(self) -> int:
        """Blocks allocated."""
        return int(self.array.shape[0])

    @property
    def used(self) -> int:
        """Blocks in use."""
        return int(np.count_nonzero(self._counts() > 0))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.block_nbytes

    @property
    def wasteful(self) -> bool:
        """Whether much more is allocated than is in use."""
        return self._is_wasteful(self.used)

    def references(self, ids: np.ndarray) -> np.ndarray:
        """Reference counts of blocks, the shape of `ids`. Changes nothing, whoever asks."""
        return np.asarray(self._counts()[ids])

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where blocks lie in the array, the shape of `ids`."""
        return np.asarray(self._places[ids])

    def allocate(self, n: int, spare: bool = True) -> np.ndarray:
        """n free blocks, their ids int32 [n]. What copies that ended have left is used first, and
        given up if it is much more than that.

        Args:
            spare: a pool that has to grow takes more than it needs, so that growing is rare.
        """
        self._settle()
        needed = int(np.count_nonzero(self._references)) + n
        if needed > self.capacity:
            self._resize(grown(self.capacity, needed) if spare else needed)
        elif self._is_wasteful(needed):
            self._resize(_with_slack(needed) if spare else needed)
        if (missing := needed - len(self._references)) > 0:
            self._references = np.pad(self._references, (0, missing))
            self._places = np.pad(self._places, (0, missing))
        ids = np.flatnonzero(self._references == 0)[:n].astype(np.int32)
        free = np.ones(self.capacity, bool)
        free[self._places[self._references > 0]] = False
        self._places[ids] = np.flatnonzero(free)[:n]  # ascending, so that neighbours stay together
        self._references[ids] = 1
        return ids

    def retain(self, ids: np.ndarray) -> None:
        """One more owner for each of the blocks."""
        np.add.at(self._references, ids, 1)

    def release(self, ids: np.ndarray) -> None:
        """One owner less for each; blocks that nobody owns are free."""
        np.subtract.at(self._references, ids, 1)

    def give_back(self, ids: np.ndarray) -> None:
        """`release` for a finalizer, which may run in any thread and at any moment: it is done when
        blocks are next allocated."""
        self._given_back.append(ids)

    def compact(self) -> None:
        """Hold no blocks in reserve. Those in use move together, and whoever holds the old array
        keeps its content."""
        self._settle()
        if (used := int(np.count_nonzero(self._references))) < self.capacity:
            self._resize(used)

    def write(self, ids: np.ndarray, blocks: mx.array) -> None:
        """Set blocks [n, words] at `ids` [n]; in place if nothing else holds the array by then."""
        # A new Python object for the result: whoever holds the old one keeps the old content.
        (target,) = mx.depends([self.array], [blocks])
        places = self._places[ids]
        if bool(np.all(np.diff(places) == 1)):
            self.array = mx.slice_update(target, blocks, mx.array(places[:1]), (0,))
        else:
            target[mx.array(places)] = blocks
            self.array = target

    def _counts(self) -> np.ndarray:
        """Reference counts by id, with what was given back subtracted."""
        counts = self._references
        if self._given_back:
            counts = counts.copy()
            for ids in tuple(self._given_back):
                np.subtract.at(counts, ids, 1)
        return counts

    def _settle(self) -> None:
        """Subtract what finalizers gave back."""
        while self._given_back:
            self.release(self._given_back.pop())

    def _is_wasteful(self, used: int) -> bool:
        return self.capacity > _with_slack(used) + GROWTH_STEP

    def _resize(self, capacity: int) -> None:
        """Have room for so many blocks, at least those in use."""
        missing = capacity - self.capacity
        if missing > 0:
            more = mx.zeros((missing, self.words), mx.uint32)
            self.array = mx.concatenate([self.array, more]) if self.capacity else more
            return
        used = np.flatnonzero(self._references)
        used = used[np.argsort(self._places[used])]
        # A copy even of what lies in front: a slice would keep the whole buffer.
        parts = [self.array[mx.array(self._places[used])]] if len(used) else []
        if len(used) < capacity or not parts:
            parts.append(mx.zeros((capacity - len(used), self.words), mx.uint32))
        self.array = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        self._places = np.zeros_like(self._places)
        self._places[used] = np.arange(len(used))
        self.moves += 1


def grown(capacity: int, needed: int) -> int:
    """Blocks of a pool of `capacity` after it has grown to hold `needed`."""
    return max(_with_slack(needed), capacity + GROWTH_STEP)


def _with_slack(blocks: int) -> int:
    return blocks + blocks // SLACK
