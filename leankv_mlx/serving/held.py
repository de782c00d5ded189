"""Bytes of many sequences that share blocks, each block counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.blocks import BlockPool
from leankv_mlx.cache import BatchedKVCache, CompressedKVCache, entries
from leankv_mlx.cache.layer import Layer


@dataclass(frozen=True, slots=True)
class Held:
    """What cache lists hold together.

    Attributes:
        sequences: how many they are of; a batch is one for each of its rows.
        tokens: seen by all of them; common ones count in each.
        used: bytes in use. Blocks, exact rows and centers that several share count once. mlx-lm's
            own caches count what they allocate, recurrent states included.
        fp16: bytes that keys and values of so many tokens take at two bytes an element and with
            nothing shared.
        shared: bytes that would be used on top if nothing were shared.
        allocated: bytes of the buffers, unused blocks of pools included.
    """

    sequences: int = 0
    tokens: int = 0
    used: int = 0
    fp16: int = 0
    shared: int = 0
    allocated: int = 0


def held(lists: Iterable[Sequence[Any]]) -> Held:
    """What cache lists hold together, counted from their buffers; nothing is computed.

    Args:
        lists: caches of a model, one list for each sequence, or for a batch of them.
    """
    ledger = Ledger()
    for caches in lists:
        ledger.add(caches)
    return ledger.held


def tokens_of(cache: Any) -> list[int]:
    """Tokens that each sequence of an entry of a cache list has seen; [] if it does not count."""
    if isinstance(cache, BatchedKVCache):
        return cache.offsets
    children = getattr(cache, "caches", None)
    if children is not None:
        return max(map(tokens_of, children), key=sum, default=[])
    offset = getattr(cache, "offset", None)
    if isinstance(offset, mx.array):
        return [int(x) for x in np.array(offset).reshape(-1)]
    return [] if offset is None else [int(offset)]


@dataclass(frozen=True, slots=True)
class Share:
    """What one cache list was counted as, so that it can be taken back.

    Attributes:
        sequences, tokens, fp16: see `Held`.
        used: bytes that it uses if nothing is shared, not even between the rows of a batch.
        blocks: pool and ids int32 [n] of the blocks of each of its tables.
        arrays: others that copies may share; each as often as it is in the list.
    """

    sequences: int
    tokens: int
    used: int
    fp16: int
    blocks: list[tuple[BlockPool, NDArray[np.int32]]]
    arrays: list[mx.array]


@dataclass(slots=True)
class _Owners:
    """How many lists own each block of a pool, int32 [capacity]."""

    pool: BlockPool
    counts: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def change(self, ids: NDArray[np.int32], by: int) -> int:
        """More or fewer owners of these blocks, each once in `ids`; how many blocks are owned on
        top, negative if it became fewer."""
        if (missing := int(ids.max(initial=-1)) + 1 - len(self.counts)) > 0:
            self.counts = np.pad(self.counts, (0, missing))
        before = np.count_nonzero(self.counts[ids])
        self.counts[ids] += by
        return int(np.count_nonzero(self.counts[ids]) - before)


class Ledger:
    """Counts cache lists that come and go. A list must not change until it is removed."""

    def __init__(self) -> None:
        self._owners: dict[int, _Owners] = {}
        self._arrays: dict[int, int] = {}  # owners by id; the shares keep the arrays alive
        self._sequences = self._tokens = self._fp16 = 0
        self._used = self._unshared = self._blocks = 0

    @property
    def used(self) -> int:
        """Bytes in use, see `Held`."""
        return self._used

    @property
    def held(self) -> Held:
        """All lists together."""
        pools = sum(owners.pool.nbytes for owners in self._owners.values())
        return Held(
            self._sequences,
            self._tokens,
            self._used,
            self._fp16,
            self._unshared - self._used,
            self._used - self._blocks + pools,
        )

    def add(self, caches: Sequence[Any]) -> Share:
        """Count a list from now on."""
        share = _share(caches)
        self._change(share, 1)
        return share

    def remove(self, share: Share) -> None:
        """Count a list no more."""
        self._change(share, -1)

    def _change(self, share: Share, by: int) -> None:
        self._sequences += by * share.sequences
        self._tokens += by * share.tokens
        self._fp16 += by * share.fp16
        self._unshared += by * share.used
        blocks = arrays = own = 0
        for pool, ids in share.blocks:
            owners = self._owners.setdefault(id(pool), _Owners(pool))
            blocks += owners.change(ids, by) * pool.block_nbytes
            own += len(ids) * pool.block_nbytes
            if by < 0 and not owners.counts.any():
                del self._owners[id(pool)]
        for array in share.arrays:
            before = self._arrays.pop(id(array), 0)
            if before + by:
                self._arrays[id(array)] = before + by
            arrays += (bool(before + by) - bool(before)) * array.nbytes
            own += array.nbytes
        self._blocks += blocks
        self._used += blocks + arrays + by * (share.used - own)


def _share(caches: Sequence[Any]) -> Share:
    blocks: list[tuple[BlockPool, NDArray[np.int32]]] = []
    arrays: list[mx.array] = []
    used = fp16 = 0
    for cache in entries(caches):
        if not isinstance(cache, CompressedKVCache):
            nbytes = int(getattr(cache, "nbytes", 0))
            used += nbytes
            fp16 += _uncompressed(cache, nbytes)
        elif cache.layer is not None:
            used += cache.layer.memory().used
            fp16 += cache.fp16_nbytes
            arrays += _arrays(cache.layer)
            if cache.layer.body is not None:
                blocks += [(table.pool, table.owned) for table in cache.layer.body.tables]
    counts = max(map(tokens_of, caches), key=sum, default=[])
    sequences = max(1, len(counts)) if caches else 0
    return Share(sequences, sum(counts), used, fp16, blocks, arrays)


def _arrays(layer: Layer) -> list[mx.array]:
    """What copies share as long as none of them takes further tokens."""
    arrays = layer.exact_arrays
    if layer.body is not None:
        arrays += layer.body.centers
    return arrays + layer.space.arrays


def _uncompressed(cache: Any, nbytes: int) -> int:
    """Bytes of one of mlx-lm's own caches at two bytes an element; recurrent states as they are."""
    sides = [getattr(cache, "keys", None), getattr(cache, "values", None)]
    if any(side is None for side in sides):
        return nbytes
    counts = tokens_of(cache)
    return sum(_side(side, counts, int(getattr(cache, "bits", 0))) for side in sides)


def _side(side: Any, counts: list[int], bits: int) -> int:
    """Keys or values: one array [B, H, slots, D], or (codes, scales, biases)."""
    array = side[0] if isinstance(side, list | tuple) else side
    batch, _, slots, _ = array.shape
    elements = int(array.size) * (32 // bits if bits else 1)
    in_use = sum(min(count, slots) for count in counts)  # a rotating cache has seen more
    return int(2 * elements * in_use // max(1, batch * slots))
