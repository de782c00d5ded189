"""A scale for each channel of the keys, undone in the queries.

Dividing a channel of all keys by a number and multiplying the same channel of all queries by it
changes no score, so it costs nothing but two small multiplications. After the rotation all channels
of a vector share its error alike, so what an error costs is the size of the keys times that of the
queries, both summed over the channels. The numbers that make this product smallest are, for each
channel, sqrt(spread of the keys / size of the queries) (Cauchy-Schwarz; SmoothQuant, arXiv
2211.10438, migrates between activations and weights alike). Large key channels of large models
(KIVI, arXiv 2402.02750) and key biases come down by it, and channels that no query looks at take
no resolution from the others.

RoPE turns pairs of channels, so what one of the two holds among the first tokens the other one
holds among later ones, and the mean of slow pairs moves away from where it was. Both channels of a
pair therefore count what the two have together, a part of their mean included.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

LIMIT = 3.0
"""Without queries, larger channels are brought down to so many times the median; the others stay
as they are, because evening out all of them raises the divergence of models without outliers."""
LARGEST = 1e4
"""Divisors lie between 1 / LARGEST and LARGEST."""
_MEAN = 0.2
"""Share of a pair's squared mean that counts as spread, for the tokens to come."""
_LEAST = 1e-3  # of the mean size of a head's channels: smaller ones count as so large


@dataclass(frozen=True)
class Equalizer:
    """Divisors of the channels of each KV head's keys: float32 [H, head_dim], positive."""

    scales: mx.array

    @classmethod
    def fit(cls, keys: mx.array, query_squares: mx.array | None = None) -> Equalizer:
        """The divisors for keys like these.

        Args:
            keys: after RoPE, which pairs channel c with c + head_dim / 2 (other layouts only gain
                less), [H, T, head_dim].
            query_squares: mean squares of the channels of each KV head's queries, after RoPE,
                float32 [H, head_dim]; None if no query is known, and then only unusually large
                key channels are made smaller.
        """
        keys = keys.astype(mx.float32)
        variance = keys.var(axis=1)
        if query_squares is None:
            size = mx.sqrt(variance)
            median = mx.sort(size, axis=-1)[:, size.shape[-1] // 2 :][:, :1]
            relative = mx.where(median > 0, size / (LIMIT * median), 1.0)
            return cls(mx.clip(relative, 1.0, LARGEST))
        spread = _of_pairs(variance + _MEAN * keys.mean(axis=1).square())
        ratio = 0.25 * (_log_floored(spread) - _log_floored(_of_pairs(query_squares)))
        scales = mx.exp(ratio - ratio.mean(axis=-1, keepdims=True))
        return cls(mx.clip(scales, 1 / LARGEST, LARGEST))

    def apply(self, keys: mx.array) -> mx.array:
        """keys: [H, T, head_dim], the dtype kept."""
        return (keys.astype(mx.float32) / self.scales[:, None]).astype(keys.dtype)

    def undo(self, keys: mx.array) -> mx.array:
        """The keys that `apply` was given, but for rounding."""
        return (keys.astype(mx.float32) * self.scales[:, None]).astype(keys.dtype)

    def queries(self, queries: mx.array) -> mx.array:
        """queries: [1, Hq, L, head_dim] -> what meets keys from `apply`, the dtype kept."""
        grouped = queries.reshape(self.scales.shape[0], -1, *queries.shape[2:])
        scaled = grouped.astype(mx.float32) * self.scales[:, None, None]
        return scaled.astype(queries.dtype).reshape(queries.shape)


def _of_pairs(squares: mx.array) -> mx.array:
    """[H, head_dim] -> for both channels of a RoPE pair their mean."""
    half = squares.shape[-1] // 2
    if squares.shape[-1] % 2:
        return squares
    return mx.tile(0.5 * (squares[:, :half] + squares[:, half:]), (1, 2))


def _log_floored(squares: mx.array) -> mx.array:
    """squares: [H, head_dim] -> logarithms; channels that are nearly 0 count as small ones."""
    least = _LEAST**2 * squares.mean(axis=-1, keepdims=True)
    return mx.log(mx.maximum(mx.maximum(squares, least), 1e-30))
