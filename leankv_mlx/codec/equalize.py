"""Channels of keys that are much larger than the others, made smaller.

Dividing a channel of all keys by a number and multiplying the same channel of all queries by it
changes no score, so it costs nothing but two small multiplications. It helps because all channels
of a vector share one scale: a few large ones take the resolution from the rest. Large models have
such channels (KIVI, arXiv 2402.02750; QServe's SmoothAttention, arXiv 2405.04532).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

LIMIT = 3.0
"""Larger channels are brought down to so many times the median; the others stay as they are,
because evening out all of them raises the divergence of models that have no outliers."""
_LARGEST = 1e4


@dataclass(frozen=True)
class Equalizer:
    """Divisors of the channels of each KV head's keys: float32 [H, head_dim], all at least 1."""

    scales: mx.array

    @classmethod
    def fit(cls, keys: mx.array) -> Equalizer:
        """keys: after RoPE, [H, T, head_dim]; what counts is their spread around their mean."""
        keys = keys.astype(mx.float32)
        size = mx.sqrt(keys.var(axis=1))
        median = mx.sort(size, axis=-1)[:, size.shape[-1] // 2 :][:, :1]
        relative = mx.where(median > 0, size / (LIMIT * median), 1.0)
        return cls(mx.clip(relative, 1.0, _LARGEST))

    def apply(self, keys: mx.array) -> mx.array:
        """keys: [H, T, head_dim], the dtype kept."""
        return (keys.astype(mx.float32) / self.scales[:, None]).astype(keys.dtype)

    def undo(self, keys: mx.array) -> mx.array:
        """The keys that `apply` was given, but for rounding."""
        return (keys.astype(mx.float32) * self.scales[:, None]).astype(keys.dtype)

    def queries(self, queries: mx.array) -> mx.array:
        """queries: [1, Hq, L, head_dim] -> what meets keys from `apply`, the dtype kept."""
        wide = mx.repeat(self.scales, queries.shape[1] // self.scales.shape[0], axis=0)
        return (queries.astype(mx.float32) * wide[:, None]).astype(queries.dtype)
