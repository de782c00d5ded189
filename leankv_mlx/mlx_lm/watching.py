"""What a model's own caches get and what its attention asks of them, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache.fetch import Arrays, hand_out
from leankv_mlx.kernels import Mask
from leankv_mlx.mlx_lm.patches import asking


class Call(NamedTuple):
    """An attention call.

    Attributes:
        queries: of the last L tokens, after RoPE, [1, Hq, L, k_head_dim].
        keys: of all tokens, after RoPE, [1, H, N, k_head_dim].
        values: likewise, [1, H, N, v_head_dim].
        scale: of the scores.
        mask: as the model asks for it.
        sink_logits: scores of a token that is not there, [Hq]; None without.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    mask: Mask
    sink_logits: mx.array | None


See = Callable[[int, Call], None]
"""Gets the number of a cache and a call that asked it."""


@dataclass(eq=False)
class _Fetched:
    """Attention over what one cache has."""

    arrays: Arrays
    see: Callable[[Call], None]

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """See `cache.Fetch.attend`."""
        self.see(Call(queries, *self.arrays, scale, mask, sink_logits))
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
        fetched = _Fetched((keys, values), lambda call: see(index, call))
        return hand_out((keys[...], values[...]), fetched)  # it lives until those objects die

    return update_and_fetch
