"""A cache in another compression, without reading its tokens again where that gains nothing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.config import CompressionConfig


def can_become(cache: Any, config: CompressionConfig | None) -> bool:
    """Whether nothing is gained by reading the tokens again."""
    if not isinstance(cache, CompressedKVCache) or cache.empty():
        return True
    if config is None or (cache.layer and cache.layer.ragged):
        return False
    if cache.config.mask and cache.config.mask != config.mask:
        return False  # the other one may keep what this one left out
    if cache.config.basis != config.basis:
        return False  # what was lost in one is not what is lost in the other
    pairs: list[tuple[Any, Any]] = [
        (config.k_bits, cache.config.k_bits),
        (config.v_bits, cache.config.v_bits),
    ]
    return all(_top(new) <= _top(old) for new, old in pairs)


def _top(bits: int | tuple[int, ...]) -> int:
    return bits if isinstance(bits, int) else max(bits)


def recoded(old: Any, fresh: Any) -> Any:
    """The tokens of one cache in another of the kind that the model now makes."""
    if isinstance(old, CompressedKVCache):
        if old.empty():
            return fresh
        keys, values = old.keys_and_values()
    elif isinstance(fresh, CompressedKVCache) and old.keys is not None:
        keys, values = old.keys[..., : old.offset, :], old.values[..., : old.offset, :]
    else:
        return old
    fresh.update_and_fetch(keys, values)
    mx.eval(fresh.state)
    return fresh
