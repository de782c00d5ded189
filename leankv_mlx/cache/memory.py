"""Bytes of a cache, counted from its buffers."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from leankv_mlx.blocks import BlockPool, BlockTable
from leankv_mlx.blocks.pool import grown
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import CompressionConfig


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """Bytes of one or several layers.

    Attributes:
        codes: packed codes of the blocks in use.
        scales: their scales.
        tables: block tables and lengths.
        side: position and score of each slot, where heads may have lost tokens; and the queries
            that scores are made from, where a policy drops them.
        exact: sink tokens and window, uncompressed.
        centers: the vectors subtracted before encoding, and those that keys are divided by. What
            was learned of a model, its basis, is counted with the model: all caches share it.
        allocated: what the buffers behind all of this hold, unused blocks included; blocks that
            copies of a cache share count in each of them, those of others alone do not.
    """

    codes: int = 0
    scales: int = 0
    tables: int = 0
    side: int = 0
    exact: int = 0
    centers: int = 0
    allocated: int = 0

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self.codes + self.scales + self.tables + self.side + self.exact + self.centers

    def __add__(self, other: "CacheMemory") -> "CacheMemory":
        return CacheMemory(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


def shared_nbytes(tables: Iterable[BlockTable]) -> int:
    """Bytes of the blocks that several of the tables own, each once for every owner but one."""
    owned: dict[BlockPool, list[np.ndarray]] = defaultdict(list)
    for table in tables:
        owned[table.pool].append(table.owned)
    return sum(
        pool.block_nbytes * (len(ids) - len(np.unique(ids)))
        for pool, ids in ((pool, np.concatenate(parts)) for pool, parts in owned.items())
    )


def planned(
    config: CompressionConfig,
    tokens: int,
    heads: int,
    k_dim: int,
    v_dim: int,
    element_bytes: int = 2,
    chunk: int = 2048,
) -> CacheMemory:
    """What `CompressedKVCache.memory` will count for one layer, without a buffer.

    Exact for tokens that arrive in chunks of `chunk` (more than 8 at a time) and keep everything;
    after single tokens up to 32 of them are still exact rows that are counted as codes here. What
    goes once a prompt is in, tokens or key channels, is all there.

    Args:
        heads: KV heads.
        element_bytes: bytes of an element of the uncompressed rows.
    """
    if tokens == 0:
        return CacheMemory()
    format = Format.of(config.k_bits, config.v_bits, k_dim, v_dim)
    ends = [*range(chunk, tokens, chunk), tokens]
    columns = [_body_columns(config, end) for end in ends]
    row = heads * (format.k_dim + format.v_dim)
    exact = (tokens - columns[-1] * TILE) * row * element_bytes
    centers = 4 * row if columns[-1] else 0
    if columns[-1] and config.equalizes:
        centers += 4 * heads * k_dim
    found = CacheMemory(exact=exact, centers=centers, allocated=exact + centers)
    return found + _planned(format.words, heads, columns) if columns[-1] else found


def _planned(words: int, heads: int, columns: Sequence[int]) -> CacheMemory:
    """Blocks of so many heads, each of `words`, that come `columns` at a time."""
    capacity = 0
    for width in columns:
        if width * heads > capacity:
            capacity = grown(capacity, width * heads)
    blocks, tables = columns[-1] * heads, 4 * heads * (columns[-1] + 1)
    return CacheMemory(
        codes=blocks * (4 * words - 4 * TILE),
        scales=blocks * TILE * 4,
        tables=tables,
        allocated=capacity * 4 * words + tables,
    )


def _body_columns(config: CompressionConfig, tokens: int) -> int:
    """Blocks per head once `tokens` have been read."""
    return max(0, tokens - min(config.sink_tokens, tokens) - config.window) // TILE
