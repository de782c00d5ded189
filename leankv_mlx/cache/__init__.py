"""The compressed KV cache behind mlx-lm's cache protocol."""

from leankv_mlx.cache.compressed import (
    CompressedKVCache,
    act_together,
    end_prompt,
    forget_queries,
    place_by,
)
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.parts import one_update
from leankv_mlx.cache.tracking import Fetched, owner_of

__all__ = [
    "CacheMemory",
    "CompressedKVCache",
    "Fetched",
    "act_together",
    "end_prompt",
    "forget_queries",
    "one_update",
    "owner_of",
    "place_by",
]
