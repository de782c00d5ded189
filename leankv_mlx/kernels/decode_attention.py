"""Attention of a few new tokens over a compressed sequence."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

import mlx.core as mx

from leankv_mlx.codec.format import TILE
from leankv_mlx.errors import ConfigError, DroppedTokensError, ShapeError
from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.types import (
    MAX_DECODE_TOKENS,
    Attention,
    Backend,
    Body,
    Centers,
    DecodeInputs,
    Mask,
    Rotations,
    Rows,
)


def decode_attention_ops(inputs: DecodeInputs) -> Attention:
    """Ops-based reference implementation of `decode_attention`: exact centering spelled out.

    Body codes are centered, so body scores get the scalar q.mu_k and the output gets mu_v times
    the probability mass of the body (not 1: sink logits, sink tokens and the window take some).
    """
    if inputs.rotations is not None:
        return between_rotations(decode_attention_ops, inputs)
    bodies, exact, centers, sinks = inputs.bodies, inputs.exact, inputs.centers, inputs.sinks
    query_heads, length, dim = inputs.queries.shape
    heads, rows = exact.k.shape[0], exact.k.shape[1]
    # The query heads of a KV head and their tokens side by side: [H, G * L, Dk].
    q = (inputs.queries.astype(mx.float32) * inputs.scale).reshape(heads, -1, dim)

    scores, values = [], []
    for body in bodies:
        assert centers is not None  # a body has been encoded, so centers were fitted
        k, v = dequantize_ops(body, _no_centers(centers), mx.float32)
        s = q @ k.swapaxes(1, 2) + (q * centers.k[:, None]).sum(-1, keepdims=True)
        if not body.full:
            used = mx.arange(body.slots) < body.lengths[:, None]
            s = mx.where(used[:, None], s, -mx.inf)
            v = mx.where(used[..., None], v, 0.0)
        scores.append(s)
        values.append(v)
    s = q @ exact.k.astype(mx.float32).swapaxes(1, 2)
    scores[:0], scores[len(scores) :] = [s[..., :sinks]], [s[..., sinks:]]
    values[:0], values[len(values) :] = [exact.v[:, :sinks]], [exact.v[:, sinks:]]

    columns = sum(part.shape[-1] for part in scores)
    s = mx.concatenate(scores, axis=-1).reshape(query_heads, length, columns)
    s = _masked(s, inputs.mask)
    if inputs.sink_logits is not None:
        logits = inputs.sink_logits.astype(mx.float32)[:, None, None]
        logits = mx.broadcast_to(logits, (*s.shape[:2], 1))
        lse = mx.logsumexp(mx.concatenate([logits, s], axis=-1), axis=-1)
    else:
        lse = mx.logsumexp(s, axis=-1)
    p = mx.exp(s - lse[..., None]).reshape(heads, -1, columns)
    v = mx.concatenate([part.astype(mx.float32) for part in values], axis=1)
    weights, reads = p, None
    if inputs.skip:
        weights, reads = _skipped(p, s.reshape(p.shape), inputs)
    out = weights @ v
    if bodies and centers is not None:
        mass = p[..., sinks : sinks + columns - rows].sum(-1, keepdims=True)
        out = out + mass * centers.v[:, None]
    return Attention(out.reshape(query_heads, length, -1), lse, reads)


def _skipped(p: mx.array, scores: mx.array, inputs: DecodeInputs) -> tuple[mx.array, mx.array]:
    """The weights that values get, and `Attention.reads`.

    p, scores: [H, G * L, N]. A token's weight is at most its share of what the exact rows alone
    add up to, so a block whose scores are all below `least` has no token that weighs `skip`.
    """
    sinks, last = inputs.sinks, inputs.sinks + sum(body.slots for body in inputs.bodies)
    exact = mx.concatenate([scores[..., :sinks], scores[..., last:]], axis=-1)
    least = mx.logsumexp(exact, axis=-1, keepdims=True) + log(inputs.skip)
    kept = scores[..., sinks:last].reshape(*scores.shape[:-1], -1, TILE).max(-1) >= least
    used = mx.concatenate(
        [mx.arange(0, body.slots, TILE) < body.lengths[:, None] for body in inputs.bodies], axis=1
    )
    reads = mx.stack([(used & kept.any(1)).sum(), used.sum()]).astype(mx.int32)
    weights = mx.where(mx.repeat(kept, TILE, axis=-1), p[..., sinks:last], 0.0)
    return mx.concatenate([p[..., :sinks], weights, p[..., last:]], axis=-1), reads[None]


def between_rotations(
    attend: Callable[[DecodeInputs], Attention], inputs: DecodeInputs
) -> Attention:
    """Attention of rotated queries, its output un-rotated and in the dtype of the queries."""
    assert inputs.rotations is not None
    k, v = inputs.rotations
    queries = k.apply(inputs.queries.astype(mx.float32))
    attention = attend(replace(inputs, queries=queries, rotations=None))
    return attention._replace(out=v.undo(attention.out).astype(inputs.queries.dtype))


def _no_centers(centers: Centers) -> Centers:
    return Centers(mx.zeros_like(centers.k), mx.zeros_like(centers.v))


def _masked(scores: mx.array, mask: Mask) -> mx.array:
    """scores: [Hq, L, N]; the L rows are the last of the N tokens."""
    if mask is None:
        return scores
    if isinstance(mask, str):
        length, columns = scores.shape[1:]
        mask = mx.arange(columns - length, columns)[:, None] >= mx.arange(columns)
    if mask.ndim == 4:
        mask = mask[0]
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, -mx.inf)
    return scores + mask.astype(mx.float32)


def decode_attention(
    queries: mx.array,
    bodies: Sequence[Body],
    exact: Rows,
    centers: Centers | None,
    *,
    scale: float,
    sinks: int,
    mask: Mask,
    sink_logits: mx.array | None,
    backend: Backend,
    rotations: Rotations | None = None,
    skip: float = 0.0,
) -> Attention:
    """Softmax attention over sink tokens, bodies and window in one pass.

    Args:
        queries: [Hq, L, Dk], rotated, or [Hq, L, head_dim] with `rotations`; L of 1 to 8, any
            float dtype.
        bodies: the compressed tokens, one entry for each tier.
        exact: uncompressed rows [H, E, D]: sink tokens, window, and the L new tokens last.
        centers: of the bodies; None while there is no body.
        scale: factor of the scores, usually head_dim ** -0.5.
        sinks: how many of the exact rows are sink tokens, which stand before the body.
        mask: None (every query sees every token), "causal", or an array over all tokens in
            order: [L, N], [1 or Hq, L, N] or [1, 1 or Hq, L, N], bool or additive.
        sink_logits: learned logits [Hq] that take part in the softmax without a value (gpt_oss).
        backend: who computes it.
        rotations: if given, of the queries, and undone in the output.
        skip: an attention weight; 0 for none. A query row takes the values of a block of a body
            to be their center if none of its tokens can weigh that much, and values that no row
            of a KV head needs are not read. The scores of a token and of the exact rows bound its
            weight from above. Softmax and log-sum-exp stay exact, and the choice is the same for
            all backends.

    Returns:
        The output, float32 [Hq, L, Dv] and rotated; with `rotations` un-rotated and in the dtype
        of the queries. And the log-sum-exp.

    Raises:
        ShapeError: a shape does not fit.
        DroppedTokensError: an array mask over a body that lost tokens.
        ConfigError: `skip` is not a weight below 1.
    """
    query_heads, length, dim = queries.shape
    heads = exact.k.shape[0]
    expected = rotations[0].head_dim if rotations else exact.k.shape[2]
    if not 1 <= length <= MAX_DECODE_TOKENS:
        raise ShapeError(f"[decode_attention] expected 1 to {MAX_DECODE_TOKENS} tokens: {length}.")
    if query_heads % heads or dim != expected:
        raise ShapeError(
            f"[decode_attention] expected queries [n * {heads}, L, {expected}], "
            f"got {queries.shape}."
        )
    if not 0 <= skip < 1:
        raise ConfigError(f"skip={skip:g} is no attention weight; use 0, or more and less than 1.")
    if isinstance(mask, mx.array):
        tokens = exact.k.shape[1] + sum(body.slots for body in bodies)
        if len(bodies) > 1 or not all(body.full for body in bodies):
            raise DroppedTokensError
        if mask.shape[-2:] != (length, tokens):
            raise ShapeError(
                f"[decode_attention] expected mask [.., {length}, {tokens}], got {mask.shape}."
            )
    if not bodies or not exact.k.shape[1]:
        skip = 0.0
    return backend.decode_attention(
        DecodeInputs(
            queries, bodies, exact, centers, scale, sinks, mask, sink_logits, rotations, skip
        )
    )
