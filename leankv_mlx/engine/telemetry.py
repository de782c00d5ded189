"""Counting the caches of a conversation: what a snapshot says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.engine.events import LayerUse, Snapshot
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.usage import measure


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds a conversation.

    Attributes:
        budget: bytes that the caches may take.
        each: bytes of a further token.
        context: tokens the model was made for, 0 if unknown.
    """

    budget: int
    each: float
    context: int

    def left(self, tokens: int, used: int) -> int:
        """Further tokens that fit."""
        fits = int(max(0, self.budget - used) / self.each) if self.each else sys.maxsize
        return min(fits, max(0, self.context - tokens)) if self.context else fits


def snapshot(request: int, caches: Sequence[Any], room: Room, speed: float) -> Snapshot:
    """Count the buffers of `caches`; `speed` is that of the reply on its way."""
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
        room.left(total.tokens, total.used),
        speed,
        tuple(layers),
        _values_read(caches),
        _exact_until(caches),
    )


def _exact_until(caches: Sequence[Any]) -> int:
    """Tokens that fit before the first block leaves the window of a layer."""
    configs = [cache.config for cache in caches if isinstance(cache, CompressedKVCache)]
    return min((each.sink_tokens + each.window + TILE for each in configs), default=0)


def _values_read(caches: Sequence[Any]) -> float:
    shares = [cache.values_read for cache in caches if isinstance(cache, CompressedKVCache)]
    return sum(shares) / len(shares) if shares else 1.0


def bytes_per_token(model: nn.Module) -> float:
    """What one more token costs in the caches that the model makes now, once windows are full.

    Runs the model on one token: that is where the shapes come from, and kernels are warm after.
    """
    caches = make_caches(model)
    mx.eval(model(mx.array([[1]]), cache=caches))
    return sum(map(_bytes_per_token, caches))


def _bytes_per_token(cache: Any) -> float:
    """What one more token costs once the window is full."""
    if isinstance(cache, CompressedKVCache):
        if cache.empty():
            return 0.0
        exact = cache.view().exact
        heads, _, k_dim = exact.k.shape
        config = cache.config
        words = Format.of(config.k_bits, config.v_bits, k_dim, exact.v.shape[2]).words
        return float(heads * 4 * (words + 1) / TILE)  # a block and its entry in the table
    if type(cache).__name__ != "KVCache" or not cache.offset:
        return 0.0  # bounded, or not known
    return measure([cache]).used / float(cache.offset)


def _heads(cache: Any, used: int) -> tuple[int, ...]:
    """Bytes of each KV head; what is not kept per head is spread evenly."""
    if isinstance(cache, CompressedKVCache):
        if cache.empty():
            return ()
        view = cache.view()
        heads = view.exact.k.shape[0]
        own = [0] * heads
        for body in view.bodies:
            for head, slots in enumerate(np.array(body.lengths)):
                own[head] += -(-int(slots) // TILE) * body.format.words * 4
        shared = (used - sum(own)) / heads
        return tuple(int(mine + shared) for mine in own)
    keys = getattr(cache, "keys", None)
    if not isinstance(keys, mx.array) or not keys.shape[1]:
        return ()
    return (used // keys.shape[1],) * keys.shape[1]
