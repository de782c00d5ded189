"""The compressed KV cache behind mlx-lm's cache protocol."""

from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.fetch import Fetch, owner_of
from leankv_mlx.cache.lists import (
    act_together,
    can_rewind,
    end_prompt,
    forget_queries,
    is_prefix,
    place_by,
    reading,
    rewind,
)
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.parts import one_update

__all__ = [
    "CacheMemory",
    "CompressedKVCache",
    "Fetch",
    "act_together",
    "can_rewind",
    "end_prompt",
    "forget_queries",
    "is_prefix",
    "one_update",
    "owner_of",
    "place_by",
    "reading",
    "rewind",
]
