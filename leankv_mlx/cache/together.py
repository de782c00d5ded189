"""A decode step of several sequences of a layer: one append and one attention for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.fetch import Fetch
from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.shape import Shape
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Rows
from leankv_mlx.kernels.append import append_batch
from leankv_mlx.kernels.decode_attention import decode_attention_batch


def append_all(rows: Sequence[CompressedKVCache], keys: mx.array, values: mx.array) -> list[Fetch]:
    """Up to 8 tokens for each row: keys [B, H, L, k_head_dim], values [B, H, L, v_head_dim].

    Raises:
        DroppedTokensError, ShapeError, ConfigError: see `CompressedKVCache.update`.
    """
    _, heads, tokens, dim = keys.shape
    shape, dtypes = Shape(heads, dim, values.shape[3]), (keys.dtype, values.dtype)
    layers = [row.begin(shape, tokens, dtypes)[0] for row in rows]
    first = layers[0]
    if _alike(layers):
        turned = first.space.scaled(keys) if first.space.basis else keys
        exact = append_batch(
            [layer.tail for layer in layers], Rows(turned, values), first.space.rotations,
            first.backend, [layer.space.scales for layer in layers],
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
    most = max(queries.shape[2], *[fetch.tokens for fetch in fetches])
    if most > MAX_DECODE_TOKENS or not _alike([fetch.layer for fetch in fetches]):
        return None
    first = fetches[0].space  # of layers that are alike: they have a basis in common, if any
    turned = first.queries(queries) if first.basis else queries
    found = decode_attention_batch(
        turned, [fetch.view for fetch in fetches], scale=scale,
        mask=mask, sink_logits=sink_logits, backend=fetches[0].layer.backend,
        scales=[fetch.space.scales for fetch in fetches],
    )  # fmt: skip
    for i, fetch in enumerate(fetches):
        if fetch.watches:
            fetch.attended(queries[i : i + 1], found.lse[i], found.reads, scale, sink_logits)
        else:
            fetch.calls.count(found.reads)
    return found.out


def _alike(layers: Sequence[Layer]) -> bool:
    """Whether one operation can take them."""
    kind = layers[0].kind
    return all([layer.kind == kind for layer in layers])
