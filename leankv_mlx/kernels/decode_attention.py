"""Attention of a few new tokens over the compressed tokens of a layer."""

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import Any

import mlx.core as mx

from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.format import TILE
from leankv_mlx.errors import ConfigError, DroppedTokensError, ShapeError
from leankv_mlx.kernels.append import check_scales
from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.types import (
    MAX_DECODE_TOKENS,
    Attention,
    Backend,
    Centers,
    DecodeOp,
    Mask,
    Scales,
    View,
)


def decode_attention_ops(
    queries: mx.array,
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
) -> Attention:
    """Ops-based reference implementation of `decode_attention`: exact centering spelled out.

    Codes are centered, so scores of the tiers get the scalar q.mu_k and the output gets mu_v times
    their probability mass (not 1: sink logits, sink tokens and the window take some).
    """
    if view.rotations is not None:
        return between_rotations(
            decode_attention_ops, queries, view, scale=scale, mask=mask, sink_logits=sink_logits
        )
    exact, centers, sinks = view.exact, view.centers, view.sinks
    query_heads, length, dim = queries.shape
    heads, rows = exact.k.shape[0], exact.k.shape[1]
    # The query heads of a KV head and their tokens side by side: [H, G * L, Dk].
    q = (queries.astype(mx.float32) * scale).reshape(heads, -1, dim)

    scores, values = [], []
    for tier in view.tiers:
        assert centers is not None  # a tier has been encoded, so centers were fitted
        k, v = dequantize_ops(tier, _no_centers(centers), mx.float32)
        s = q @ k.swapaxes(1, 2) + (q * centers.k[:, None]).sum(-1, keepdims=True)
        if not tier.full:
            used = mx.arange(tier.slots) < tier.lengths[:, None]
            s = mx.where(used[:, None], s, -mx.inf)
            v = mx.where(used[..., None], v, 0.0)
        scores.append(s)
        values.append(v)
    s = q @ exact.k.astype(mx.float32).swapaxes(1, 2)
    scores[:0], scores[len(scores) :] = [s[..., :sinks]], [s[..., sinks:]]
    values[:0], values[len(values) :] = [exact.v[:, :sinks]], [exact.v[:, sinks:]]

    columns = sum(part.shape[-1] for part in scores)
    s = mx.concatenate(scores, axis=-1).reshape(query_heads, length, columns)
    s = _masked(s, mask)
    if sink_logits is not None:
        logits = sink_logits.astype(mx.float32)[:, None, None]
        logits = mx.broadcast_to(logits, (*s.shape[:2], 1))
        lse = mx.logsumexp(mx.concatenate([logits, s], axis=-1), axis=-1)
    else:
        lse = mx.logsumexp(s, axis=-1)
    p = mx.exp(s - lse[..., None]).reshape(heads, -1, columns)
    v = mx.concatenate([part.astype(mx.float32) for part in values], axis=1)
    weights, reads = p, None
    if view.skip:
        weights, reads = _skipped(p, s.reshape(p.shape), view)
    out = weights @ v
    if view.tiers and centers is not None:
        mass = p[..., sinks : sinks + columns - rows].sum(-1, keepdims=True)
        out = out + mass * centers.v[:, None]
    return Attention(out.reshape(query_heads, length, -1), lse, reads)


def _skipped(p: mx.array, scores: mx.array, view: View) -> tuple[mx.array, mx.array]:
    """The weights that values get, and `Attention.reads`.

    p, scores: [H, G * L, N]. A token's weight is at most its share of what the exact rows alone
    add up to, so a block whose scores are all below `least` has no token that weighs `skip`.
    """
    sinks, last = view.sinks, view.sinks + sum(tier.slots for tier in view.tiers)
    exact = mx.concatenate([scores[..., :sinks], scores[..., last:]], axis=-1)
    least = mx.logsumexp(exact, axis=-1, keepdims=True) + log(view.skip)
    kept = scores[..., sinks:last].reshape(*scores.shape[:-1], -1, TILE).max(-1) >= least
    used = mx.concatenate(
        [mx.arange(0, tier.slots, TILE) < tier.lengths[:, None] for tier in view.tiers], axis=1
    )
    reads = mx.stack([(used & kept.any(1)).sum(), used.sum()]).astype(mx.int32)
    weights = mx.where(mx.repeat(kept, TILE, axis=-1), p[..., sinks:last], 0.0)
    return mx.concatenate([p[..., :sinks], weights, p[..., last:]], axis=-1), reads[None]


def between_rotations(
    attend: DecodeOp,
    queries: mx.array,
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
) -> Attention:
    """Attention of rotated queries, its output un-rotated and in the dtype of the queries."""
    assert view.rotations is not None
    k, v = view.rotations
    rotated = k.apply(queries.astype(mx.float32))
    inside = replace(view, rotations=None)
    attention = attend(rotated, inside, scale=scale, mask=mask, sink_logits=sink_logits)
    return attention._replace(out=v.undo(attention.out).astype(queries.dtype))


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
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
    backend: Backend,
) -> Attention:
    """Softmax attention over sink tokens, tiers and window in one pass.

    Args:
        queries: [Hq, L, head_dim], or [Hq, L, Dk] and rotated if the view has no rotations; L of 1
            to 8, any float dtype.
        view: the tokens; the L new ones are the last of its exact rows. With `skip` a query row
            takes the values of a block to be their center if none of its tokens can weigh that
            much, and values that no row of a KV head needs are not read. The scores of a token and
            of the exact rows bound its weight from above. Softmax and log-sum-exp stay exact, and
            the choice is the same for all backends.
        scale: factor of the scores, usually head_dim ** -0.5.
        mask: None (every query sees every token), "causal", or an array over all tokens in
            order: [L, N], [1 or Hq, L, N] or [1, 1 or Hq, L, N], bool or additive.
        sink_logits: learned logits [Hq] that take part in the softmax without a value (gpt_oss).
        backend: who computes it.

    Returns:
        The output, [Hq, L, v_head_dim] in the dtype of the queries, or float32 [Hq, L, Dv] and
        rotated if the view has no rotations. And the log-sum-exp.

    Raises:
        ShapeError: a shape does not fit.
        DroppedTokensError: an array mask over a view that lost tokens.
        ConfigError: `skip` is not a weight below 1.
    """
    return backend.decode_attention(
        queries,
        _checked(queries.shape, view, mask),
        scale=scale,
        mask=mask,
        sink_logits=sink_logits,
    )


def decode_attention_batch(
    queries: mx.array,
    views: Sequence[View],
    *,
    scale: float,
    mask: str | None,
    sink_logits: mx.array | None,
    backend: Backend,
    scales: Scales | None = None,
) -> Attention:
    """`decode_attention` of several sequences of a model: a row is a KV head of one of them.

    Sequences are ragged: each has its own lengths, exact rows, centers and pool. Their formats,
    rotations and `skip` are the same. A sequence gets what it gets alone, on the CPU bit for bit.

    Args:
        queries: [B, Hq, L, head_dim], or [B, Hq, L, Dk] and rotated.
        views: of the B sequences.
        mask: None or "causal".
        scales: what the queries of each are multiplied by, see `kernels.types.Scales`; None for
            nothing.

    Returns:
        The output, [B, Hq, L, v_head_dim] or [B, Hq, L, Dv], and the log-sum-exp [B, Hq, L].

    Raises:
        ShapeError: a shape does not fit.
        ConfigError: `skip` is not a weight below 1.
    """
    if queries.ndim != 4 or queries.shape[0] != len(views) or not views:
        raise ShapeError(
            f"[decode_attention_batch] expected queries [{len(views)}, Hq, L, D], "
            f"got {queries.shape}."
        )
    shape, like = queries.shape[1:], _kind(views[0])
    if any([_kind(view) != like for view in views]):
        raise ShapeError("[decode_attention_batch] expected sequences of one model.")
    views = [_checked(shape, view, mask) for view in views]
    scales = check_scales(scales, len(views), views[0].exact.k.shape[0], shape[2])
    if views[0].rotations is None and any(x is not None for x in scales):
        raise ShapeError("[decode_attention_batch] rotated queries cannot be scaled.")
    asked: dict[str, Any] = {"scale": scale, "mask": mask, "sink_logits": sink_logits}
    if backend.decode_attention_batch is None:
        return each_attend(backend.decode_attention, queries, views, scales=scales, **asked)
    return backend.decode_attention_batch(queries, views, scales=scales, **asked)


def each_attend(
    attend: DecodeOp, queries: mx.array, views: Sequence[View], *, scales: Scales, **asked: Any
) -> Attention:
    """`decode_attention_batch` by an operation on one sequence."""
    scaled = _scaled(queries, scales)
    each = [attend(q[0], view, **asked) for q, view in zip(scaled, views, strict=True)]
    reads = [attention.reads for attention in each if attention.reads is not None]
    return Attention(
        mx.stack([attention.out for attention in each]),
        mx.stack([attention.lse for attention in each]),
        mx.concatenate(reads) if reads else None,
    )


def _kind(view: View) -> tuple[object, ...]:
    """What the views of a batch have in common."""
    (heads, _, k_dim), (_, _, v_dim) = (x.shape for x in view.exact)
    return heads, k_dim, v_dim, view.rotations


def scaled_queries(queries: mx.array, scales: Scales) -> mx.array:
    """queries: [B, Hq, L, head_dim] -> what is to be rotated, the dtype kept, for a backend without
    scales in its operation."""
    if all(x is None for x in scales):
        return queries
    return mx.concatenate(_scaled(queries, scales))


def _scaled(queries: mx.array, scales: Scales) -> list[mx.array]:
    """The queries of each sequence, [1, Hq, L, head_dim]."""
    each = mx.split(queries, len(scales))
    return [q if x is None else Equalizer(x).queries(q) for q, x in zip(each, scales, strict=True)]


def _checked(queries: tuple[int, ...], view: View, mask: Mask) -> View:
    """The view, with `skip` only where there is something to skip, or to compare with.

    queries: their shape, [Hq, L, D].
    """
    query_heads, length, dim = queries
    heads, exact = view.exact.k.shape[:2]
    expected = view.rotations[0].head_dim if view.rotations else view.exact.k.shape[2]
    if not 1 <= length <= MAX_DECODE_TOKENS:
        raise ShapeError(f"[decode_attention] expected 1 to {MAX_DECODE_TOKENS} tokens: {length}.")
    if query_heads % heads or dim != expected:
        raise ShapeError(
            f"[decode_attention] expected queries [n * {heads}, L, {expected}], got {queries}."
        )
    if not 0 <= view.skip < 1:
        raise ConfigError(
            f"skip={view.skip:g} is no attention weight; use 0, or more and less than 1."
        )
    if isinstance(mask, mx.array):
        if not view.whole:
            raise DroppedTokensError
        if mask.shape[-2:] != (length, exact + view.slots):
            raise ShapeError(
                f"[decode_attention] expected mask [.., {length}, {exact + view.slots}], "
                f"got {mask.shape}."
            )
    if view.skip and not (view.tiers and exact):
        view = replace(view, skip=0.0)
    return view
