"""Attention over a beginning whose keys are gated, channel by channel, with gradients.

What a gate leaves of a key is what the cache leaves of it (`cache.layer`): the tokens between sink
tokens and window have their channels moved to the center of all, by how much their gate is closed,
and a head that keeps nothing has none of those tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache.fetch import hand_out
from leankv_mlx.cache.layer import CENTER_TOKENS
from leankv_mlx.config import CompressionConfig
from leankv_mlx.kernels import Mask, Rows
from leankv_mlx.learning.beginning import Beginning, check_causal
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK
from leankv_mlx.settings import BLOCK_SLOTS

_SHAPE = CompressionConfig()
"""Whose sink tokens are never gated, nor as many tokens before a query as its window has at least.
"""


@dataclass(frozen=True)
class Gates:
    """Of all layers with a mask.

    Attributes:
        values: what is left of each channel, float32 [layers, H, head_dim]; 1 leaves all of it.
        empty: heads that hold no middle tokens, bool [layers, H]. Their gradient is that of heads
            that hold them, so that they can come back (straight-through).
    """

    values: mx.array
    empty: mx.array


def logits(
    model: nn.Module, beginning: Beginning, tokens: Sequence[int], gates: Gates | None
) -> mx.array:
    """Logits [L, V] behind each of the tokens that follow a beginning, which they see through
    gates; None for open ones. To be used while `asking`."""
    made = {
        place: _Gated(rows, None if gates is None else (gates.values[i], gates.empty[i]))
        for i, (place, rows) in enumerate(beginning.rows.items())
    }
    out: mx.array = model(mx.array([list(tokens)]), cache=beginning.caches(made))
    return out[0].astype(mx.float32)


class _Gated:
    """One layer's cache for one call."""

    def __init__(self, rows: Rows, gate: tuple[mx.array, mx.array] | None) -> None:
        self.offset = rows.k.shape[1]
        self._before = rows
        self._gate = gate
        self._rows = rows

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """As mlx-lm's own caches make it where there is no sliding window."""
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [1, H, L, head_dim] of the tokens of the call."""
        both = zip(self._before, (keys[0], values[0]), strict=True)
        self._rows = Rows(
            *(mx.concatenate([x.astype(mx.float32), y.astype(mx.float32)], 1) for x, y in both)
        )
        return hand_out((self._rows.k[None], self._rows.v[None]), self)

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """See `cache.fetch.Attends`."""
        check_causal(mask)
        heads, tokens, dim = self._rows.k.shape
        length = queries.shape[2]
        # The query heads of a KV head and their tokens side by side: [H, G * L, D].
        q = (queries[0].astype(mx.float32) * scale).reshape(heads, -1, dim)
        repeats = q.shape[1] // length
        at = mx.tile(mx.arange(tokens - length, tokens), repeats)[:, None]
        seen = mx.arange(tokens) <= at
        if sink_logits is not None:
            sink_logits = mx.repeat(sink_logits.astype(mx.float32), length).reshape(heads, -1, 1)
        exact = q @ self._rows.k.swapaxes(1, 2)
        if self._gate is None:
            out = self._weighted(mx.where(seen, exact, -mx.inf), sink_logits)
        else:
            gate, empty = self._gate
            sinks, window = _SHAPE.sink_tokens, _SHAPE.window
            near = (mx.arange(tokens) < sinks) | (mx.arange(tokens) >= at - window)
            scores = mx.where(near, exact, self._gated(q, gate))
            out = self._weighted(mx.where(seen, scores, -mx.inf), sink_logits)
            alone = self._weighted(mx.where(seen & near, exact, -mx.inf), sink_logits)
            out = mx.where(empty[:, None, None], alone + (out - mx.stop_gradient(out)), out)
        return out.reshape(queries.shape[1], length, -1)[None].astype(queries.dtype)

    def _gated(self, q: mx.array, gate: mx.array) -> mx.array:
        """Scores of all tokens as if they were compressed, [H, G * L, N]."""
        k, sinks = self._rows.k, _SHAPE.sink_tokens
        # The cache fits them to what leaves the window first: of a chunk, or else a block.
        first = min(self.offset, PREFILL_CHUNK) - sinks - _SHAPE.window
        fitted = min(CENTER_TOKENS, max(1, first // BLOCK_SLOTS) * BLOCK_SLOTS)
        center = mx.stop_gradient(k[:, sinks : sinks + fitted].mean(axis=1, keepdims=True))
        open_ = q * gate[:, None]
        return open_ @ k.swapaxes(1, 2) + (q - open_) @ center.swapaxes(1, 2)

    def _weighted(self, scores: mx.array, sink_logits: mx.array | None) -> mx.array:
        if sink_logits is not None:
            scores = mx.concatenate([sink_logits, scores], axis=-1)
        weights = mx.softmax(scores, axis=-1)
        return (weights[..., 1:] if sink_logits is not None else weights) @ self._rows.v
