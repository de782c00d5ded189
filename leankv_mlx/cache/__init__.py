"""The compressed KV cache behind mlx-lm's cache protocol."""

from leankv_mlx.cache.batch import BatchedKVCache
from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.fetch import Fetch, owner_of
from leankv_mlx.cache.lists import Sequences, entries
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.sequence import Sequence

__all__ = [
    "BatchedKVCache",
    "CacheMemory",
    "CompressedKVCache",
    "Fetch",
    "Sequence",
    "Sequences",
    "entries",
    "owner_of",
]
