"""What a model's own caches get and what its attention asks of them, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache.fetch import Arrays, hand_out
from leankv_mlx.kernels import Mask
from leankv_mlx.mlx_lm.patches import asking

See = Callable[[int, mx.array, mx.array], None]
"""Gets the number of a cache, the queries [1, Hq, L, head_dim] and all keys [1, H, N, head_dim] of
an attention call, after RoPE."""


@dataclass(eq=False)
class _Fetched:
    """Attention over what one cache has."""

    arrays: Arrays
    see: Callable[[mx.array, mx.array], None]

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """See `cache.Fetch.attend`."""
        self.see(queries, self.arrays[0])
        out: mx.array = mx.fast.scaled_dot_product_attention(
            queries, *self.arrays, scale=scale, mask=mask, sinks=sink_logits
        )
        return out


@contextmanager
def watched(model: nn.Module, caches: Sequence[Any], see: See) -> Iterator[None]:
    """`see` is called for each attention that asks one of the caches inside of the block; a model
    that computes attention from the arrays is not seen.

    Args:
        caches: of mlx-lm's own classes.
    """
    watching = [(i, cache) for i, cache in enumerate(caches) if hasattr(cache, "update_and_fetch")]
    with asking(model):
        try:
            for index, cache in watching:
                cache.update_and_fetch = _watching(cache.update_and_fetch, index, see)
            yield
        finally:
            for _, cache in watching:
                vars(cache).pop("update_and_fetch", None)


def _watching(
    original: Callable[..., Arrays], index: int, see: See
) -> Callable[[mx.array, mx.array], Arrays]:
    def update_and_fetch(keys: mx.array, values: mx.array) -> Arrays:
        keys, values = original(keys, values)
        fetched = _Fetched((keys, values), lambda q, k: see(index, q, k))
        return hand_out((keys[...], values[...]), fetched)  # it lives until those objects die

    return update_and_fetch
