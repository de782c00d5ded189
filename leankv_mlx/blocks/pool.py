"""A growing array of equal blocks with reference counts."""

import mlx.core as mx
import numpy as np

GROWTH_STEP = 32
"""Blocks by which a pool grows at least."""
SLACK = 8
"""A growing pool takes 1/SLACK more blocks than it needs, so that growing is rare."""


class BlockPool:
    """`array` is uint32 [capacity, words]. One pool per layer and format: MLX updates an array in
    place only while nothing else holds it, and arrays of different layers would hold each other's.

    A block with a reference count of 0 is free. Copies of a cache share the pool and count.
    """

    def __init__(self, words: int) -> None:
        self.array = mx.zeros((0, words), mx.uint32)
        self._references = np.zeros(0, np.int32)

    @classmethod
    def holding(cls, array: mx.array, ids: np.ndarray) -> "BlockPool":
        """A pool around an existing array of which the blocks `ids` are in use once each."""
        pool = cls(array.shape[1])
        if array.shape[0]:  # what has no rows is never computed, and would keep what it came from
            pool.array = array
        pool._references = np.bincount(ids.ravel(), minlength=array.shape[0]).astype(np.int32)
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
        return len(self._references)

    @property
    def used(self) -> int:
        """Blocks in use."""
        return int(np.count_nonzero(self._references))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.block_nbytes

    def references(self, ids: np.ndarray) -> np.ndarray:
        """Reference counts of blocks, the shape of `ids`."""
        return np.asarray(self._references[ids])

    def allocate(self, n: int, spare: bool = True) -> np.ndarray:
        """n free blocks, int32 [n], in ascending order so that neighbours stay together.

        Args:
            spare: a pool that has to grow takes more than it needs, so that growing is rare.
        """
        needed = self.used + n
        if needed > self.capacity:
            self._resize(grown(self.capacity, needed) if spare else needed)
        ids = np.flatnonzero(self._references == 0)[:n].astype(np.int32)
        self._references[ids] = 1
        return ids

    def retain(self, ids: np.ndarray) -> None:
        """One more owner for each of the blocks."""
        np.add.at(self._references, ids, 1)

    def release(self, ids: np.ndarray) -> None:
        """One owner less for each; blocks that nobody owns are free. Touches no array, so that a
        finalizer may call it from any thread."""
        np.subtract.at(self._references, ids, 1)

    @property
    def wasteful(self) -> bool:
        """Whether much more is allocated than is in use."""
        return self.capacity > _with_slack(self.used) + GROWTH_STEP

    def shrink(self) -> None:
        """Cut off a free end that is larger than a step."""
        used = np.flatnonzero(self._references)
        top = int(used[-1]) + 1 if len(used) else 0
        if self.capacity > _with_slack(top) + GROWTH_STEP:
            self._resize(top)

    def write(self, ids: np.ndarray, blocks: mx.array) -> None:
        """Set blocks [n, words] at `ids` [n]; in place if nothing else holds the array by then."""
        # A new Python object for the result: whoever holds the old one keeps the old content.
        (target,) = mx.depends([self.array], [blocks])
        first, n = int(ids[0]), len(ids)
        if int(ids[-1]) - first == n - 1 and bool(np.all(np.diff(ids) == 1)):
            self.array = mx.slice_update(target, blocks, mx.array([first]), (0,))
        else:
            target[mx.array(ids)] = blocks
            self.array = target

    def _resize(self, capacity: int) -> None:
        missing = capacity - self.capacity
        if missing > 0:
            more = mx.zeros((missing, self.words), mx.uint32)
            self.array = mx.concatenate([self.array, more]) if self.capacity else more
            self._references = np.pad(self._references, (0, missing))
        elif capacity == 0:
            self.array, self._references = (
                mx.zeros((0, self.words), mx.uint32),
                np.zeros(0, np.int32),
            )
        else:
            # A copy, because a slice would keep the whole buffer.
            self.array = mx.concatenate([self.array[:capacity], self.array[:0]])
            self._references = self._references[:capacity].copy()


def grown(capacity: int, needed: int) -> int:
    """Blocks of a pool of `capacity` after it has grown to hold `needed`."""
    return max(_with_slack(needed), capacity + GROWTH_STEP)


def _with_slack(blocks: int) -> int:
    return blocks + blocks // SLACK
