"""A decode step of several sequences of a layer: one append and one attention for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.fetch import Fetch
from leankv_mlx.cache.layer import Layer
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Rows
from leankv_mlx.kernels.append import append_batch
from leankv_mlx.kernels.decode_attention import decode_attention_batch


def append_all(rows: Sequence[CompressedKVCache], keys: mx.array, values: mx.array) -> list[Fetch]:
    """Up to 8 tokens for each row: keys [B, H, L, k_head_dim], values [B, H, L, v_head_dim].

    Raises:
        DroppedTokensError, ShapeError, ConfigError: see `CompressedKVCache.update`.
    """
    layers = [row.begin_update(keys[i : i + 1], values[i : i + 1])[0] for i, row in enumerate(rows)]
    first, tokens = layers[0], keys.shape[2]
    if all(_alike(layer, first) for layer in layers):
        scaled = mx.stack([layer.space.scaled(keys[i]) for i, layer in enumerate(layers)])
        exact = append_batch(
            [layer.exact for layer in layers], Rows(scaled, values), first.space.rotations,
            first.backend,
        )  # fmt: skip
        for layer, appended in zip(layers, exact, strict=True):
            layer.appended(appended, tokens, keys.dtype)
    else:
        for i, layer in enumerate(layers):
            layer.append(keys[i], values[i])
    return [row.appended(layer, tokens) for row, layer in zip(rows, layers, strict=True)]


def attend_all(
    fetches: Sequence[Fetch],
    queries: mx.array,
    scale: float,
    mask: str | None,
    sink_logits: mx.array | None,
) -> mx.array | None:
    """queries: [B, Hq, L, head_dim] -> [B, Hq, L, v_head_dim]; None if one operation cannot take
    them together."""
    first, length = fetches[0], queries.shape[2]
    if length > MAX_DECODE_TOKENS or any(
        fetch.tokens > MAX_DECODE_TOKENS or not _alike(fetch.layer, first.layer)
        for fetch in fetches
    ):
        return None
    scaled = mx.concatenate(
        [fetch.space.queries(queries[i : i + 1]) for i, fetch in enumerate(fetches)]
    )
    found = decode_attention_batch(
        scaled, [fetch.view for fetch in fetches], scale=scale, mask=mask,
        sink_logits=sink_logits, backend=first.layer.backend,
    )  # fmt: skip
    for i, fetch in enumerate(fetches):
        fetch.attended(queries[i : i + 1], found.lse[i], found.reads, scale, sink_logits)
    return found.out


def _alike(layer: Layer, other: Layer) -> bool:
    """Whether one operation can take both."""
    return layer is other or (
        layer.shape == other.shape
        and layer.config == other.config
        and layer.backend.name == other.backend.name
        and layer.exact.k.dtype == other.exact.k.dtype
        and layer.exact.v.dtype == other.exact.v.dtype
    )
