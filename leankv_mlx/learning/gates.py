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
from leankv_mlx.learning.beginning import Beginning, Causal, check_causal
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK
from leankv_mlx.settings import BLOCK_SLOTS

_SHAPE = CompressionConfig()
"""Whose sink tokens are never gated, nor as many tokens before a query as its window has at least.
"""


@dataclass(frozen=True)
class Gates:
    """Of all layers with a mask; 1 leaves all there is, 0 nothing.

    Attributes:
        channels: what is left of each channel, float32 [layers, H, head_dim].
        heads: what is left of the tokens between sink tokens and window, float32 [layers, H]: the
            output of a head is so much that with them and for the rest that without (DuoAttention,
            arXiv 2410.10819, section 2.2).
    """

    channels: mx.array
    heads: mx.array


def logits(
    model: nn.Module, beginning: Beginning, tokens: Sequence[int], gates: Gates | None
) -> mx.array:
    """Logits [L, V] behind each of the tokens that follow a beginning, which they see through
    gates; None for open ones. To be used while `asking`."""
    made = {
        place: _Gated(rows, None if gates is None else (gates.channels[i], gates.heads[i]))
        for i, (place, rows) in enumerate(beginning.rows.items())
    }
    out: mx.array = model(mx.array([list(tokens)]), cache=beginning.caches(made))
    return out[0].astype(mx.float32)


class _Gated(Causal):
    """One layer's cache for one call."""

    def __init__(self, rows: Rows, gate: tuple[mx.array, mx.array] | None) -> None:
        self.offset = rows.k.shape[1]
        self._before = rows
        self._gate = gate
        self._rows = rows

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
        if sink_logits is not None:
            sink_logits = mx.repeat(sink_logits.astype(mx.float32), length).reshape(heads, -1, 1)
        # What is exact for some of the queries: sink tokens, and from the first one's window on.
        sinks = min(_SHAPE.sink_tokens, self.offset)
        late = 0 if self._gate is None else max(sinks, self.offset - _SHAPE.window)
        k, v = self._rows
        last = mx.arange(late, tokens)
        at = mx.tile(mx.arange(self.offset, tokens), repeats)[:, None]
        seen, near = last <= at, last >= at - _SHAPE.window
        exact = q @ k[:, late:].swapaxes(1, 2)
        if self._gate is None:
            out = _weighted(mx.where(seen, exact, -mx.inf), v, sink_logits)
        else:
            channels, held = self._gate
            first = q @ k[:, :sinks].swapaxes(1, 2)
            gated = self._gated(q, k[:, sinks:], channels)
            middle, behind = gated[..., : late - sinks], gated[..., late - sinks :]
            behind = mx.where(seen, mx.where(near, exact, behind), -mx.inf)
            out = _weighted(mx.concatenate([first, middle, behind], axis=-1), v, sink_logits)
            behind = mx.where(seen & near, exact, -mx.inf)
            held_anyway = mx.concatenate([v[:, :sinks], v[:, late:]], axis=1)
            alone = _weighted(mx.concatenate([first, behind], axis=-1), held_anyway, sink_logits)
            out = alone + held[:, None, None] * (out - alone)
        return out.reshape(queries.shape[1], length, -1)[None].astype(queries.dtype)

    def _gated(self, q: mx.array, keys: mx.array, channels: mx.array) -> mx.array:
        """Scores of keys behind the sink tokens as if they were compressed."""
        # The cache fits the center to what leaves the window first: of a chunk, or else a block.
        sinks = min(_SHAPE.sink_tokens, self.offset)
        first = min(self.offset, PREFILL_CHUNK) - sinks - _SHAPE.window
        fitted = min(CENTER_TOKENS, max(1, first // BLOCK_SLOTS) * BLOCK_SLOTS)
        center = mx.stop_gradient(keys[:, :fitted].mean(axis=1, keepdims=True))
        open_ = q * channels[:, None]
        return open_ @ keys.swapaxes(1, 2) + (q - open_) @ center.swapaxes(1, 2)


def _weighted(scores: mx.array, values: mx.array, sink_logits: mx.array | None) -> mx.array:
    if sink_logits is not None:
        scores = mx.concatenate([sink_logits, scores], axis=-1)
    weights = mx.softmax(scores, axis=-1)
    return (weights[..., 1:] if sink_logits is not None else weights) @ values
