"""Counting the caches of a conversation: what a snapshot says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.codec.format import TILE
from leankv_mlx.engine.events import LayerUse, Snapshot
from leankv_mlx.engine.room import Room
from leankv_mlx.mlx_lm.usage import measure


def snapshot(
    request: int, caches: Sequence[Any], room: Room, speed: float, weights_read: float
) -> Snapshot:
    """Count the buffers of `caches`; `speed` is that of the reply on its way, `weights_read` what
    its last step read of the weights."""
    total = measure(caches)
    memory = CacheMemory()
    layers = []
    for cache in caches:
        use = measure([cache])
        compressed = isinstance(cache, CompressedKVCache)
        if compressed:
            memory += cache.memory()
        layers.append(LayerUse(compressed, use.used, use.fp16, _heads(cache, use.used)))
    return Snapshot(
        request,
        total.tokens,
        total.fp16,
        memory.codes,
        memory.scales,
        memory.tables + memory.side,
        memory.exact,
        memory.centers,
        total.used - memory.used,
        total.allocated,
        mx.get_peak_memory(),
        room.left(total),
        speed,
        tuple(layers),
        _values_read(caches),
        weights_read,
        _exact_until(caches),
    )


def _exact_until(caches: Sequence[Any]) -> int:
    """Tokens that fit before the first block leaves the window of a layer."""
    configs = [cache.config for cache in caches if isinstance(cache, CompressedKVCache)]
    return min((each.sink_tokens + each.window + TILE for each in configs), default=0)


def _values_read(caches: Sequence[Any]) -> float:
    shares = [cache.values_read for cache in caches if isinstance(cache, CompressedKVCache)]
    return sum(shares) / len(shares) if shares else 1.0


def _heads(cache: Any, used: int) -> tuple[int, ...]:
    """Bytes of each KV head; what is not kept per head is spread evenly."""
    if isinstance(cache, CompressedKVCache):
        if cache.empty():
            return ()
        view = cache.view()
        heads = view.exact.k.shape[0]
        own = [0] * heads
        for body in view.tiers:
            for head, slots in enumerate(np.array(body.lengths)):
                own[head] += -(-int(slots) // TILE) * body.format.words * 4
        shared = (used - sum(own)) / heads
        return tuple(int(mine + shared) for mine in own)
    keys = getattr(cache, "keys", None)
    if not isinstance(keys, mx.array) or not keys.shape[1]:
        return ()
    return (used // keys.shape[1],) * keys.shape[1]
