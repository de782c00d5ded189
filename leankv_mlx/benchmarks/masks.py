"""Attention of one new token over caches whose codes keep some key channels, beside all of them.

Which groups of channels are kept is drawn, as many of those of all layers as the ratio leaves: time
and bytes depend on how many a head keeps, and on nothing else of a mask that a model has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from leankv_mlx.benchmarks.attention import CACHES, LAYERS, decode_step
from leankv_mlx.benchmarks.fill import wait
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.shapes import Heads
from leankv_mlx.benchmarks.timing import interleave
from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.format import TILE, padded
from leankv_mlx.config import CompressionConfig
from leankv_mlx.settings import Named

USUAL = ("k4v4",)
RATIOS = (0.6, 0.7)
"""Of the groups of key channels that are not kept."""
WHOLE = "whole keys"


@dataclass(frozen=True)
class _Bytes:
    """Of the codes of several layers."""

    k: int
    v: int
    scales: int

    @classmethod
    def of(cls, caches: Sequence[CompressedKVCache]) -> _Bytes:
        k = v = slots = 0
        for tier in (tier for cache in caches for tier in cache.view().tiers):
            used = sum(np.array(tier.lengths).tolist())
            k += used * sum(tier.format.k_bits) * TILE // 8
            v += used * sum(tier.format.v_bits) * TILE // 8
            slots += used
        return cls(k, v, 4 * slots)

    @property
    def all(self) -> int:
        return self.k + self.v + self.scales


def measure_masks(settings: Settings, advance: Advance) -> list[Row]:
    """A row for each of formats x heads x tokens x ratios."""
    rows = []
    for name, config in settings.configs(USUAL).items():
        for heads in settings.heads:
            for tokens in settings.masks:
                advance(f"masks, {name}, {heads.query}x{heads.kv}x{heads.dim}, {tokens} tokens")
                rows += [{"format": name} | row for row in _group(heads, tokens, config, settings)]
                mx.clear_cache()
    return rows


def masks(heads: Heads, ratio: float, layers: int) -> list[Channels]:
    """Of so many layers."""
    draw, size = np.random.default_rng(0), padded(heads.dim) // TILE
    all_groups = layers * heads.kv * size
    kept = draw.permutation(all_groups) < round((1 - ratio) * all_groups)
    groups = kept.reshape(layers, heads.kv, size).sum(axis=-1)
    channels = np.broadcast_to(np.arange(heads.dim), (layers, heads.kv, heads.dim))
    pairs = zip(draw.permuted(channels, axis=-1), groups, strict=True)
    return [Channels.of(order, of_layer) for order, of_layer in pairs]


def _group(heads: Heads, tokens: int, config: CompressionConfig, settings: Settings) -> list[Row]:
    """One interleaved run: all ratios, and all channels."""
    queries = mx.random.normal((1, heads.query, 1, heads.dim)).astype(mx.bfloat16)
    masked = replace(config, mask=Named("drawn"))
    found = {f"{ratio:g}": masks(heads, ratio, CACHES) for ratio in RATIOS}
    caches = {WHOLE: [CompressedKVCache(config) for _ in range(CACHES)]} | {
        name: [CompressedKVCache(masked, learned=channels) for channels in layers]
        for name, layers in found.items()
    }
    shape = 1, heads.kv, tokens, heads.dim
    keys, values = (mx.random.normal(shape).astype(mx.bfloat16) for _ in "kv")
    for cache in (cache for some in caches.values() for cache in some):
        cache.update(keys, values)  # once: only what was attended to may be followed by more
        cache.sequence.narrow()
        wait([cache])
    arms = {name: decode_step(some, queries) for name, some in caches.items()}
    timings = interleave(arms, settings.budget).divided(dict.fromkeys(arms, LAYERS))
    whole = _Bytes.of(caches[WHOLE])
    rows = []
    for name, layers in found.items():
        own = _Bytes.of(caches[name])
        rows.append(
            {
                "tokens": tokens,
                "query_heads": heads.query,
                "kv_heads": heads.kv,
                "head_dim": heads.dim,
                "ratio": float(name),
                "empty_heads": float(np.mean([[not n for n in one.groups] for one in layers])),
                "k_bytes": own.k / whole.k,
                "v_bytes": own.v / whole.v,
                "bytes": own.all / whole.all,
                **compared(timings, name, [WHOLE]),
            }
        )
    return rows
