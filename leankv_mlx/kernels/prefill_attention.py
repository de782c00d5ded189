"""Attention of many new tokens over the decoded rows of a sequence."""

import mlx.core as mx

from leankv_mlx.errors import DroppedTokensError, ShapeError
from leankv_mlx.kernels.types import Backend, Mask, PrefillInputs, Rotations, Rows

QUERY_TILE = 256
"""Query rows at a time where MLX builds the whole score matrix."""


def prefill_attention_ops(inputs: PrefillInputs) -> mx.array:
    """Ops-based reference implementation of `prefill_attention`: MLX's own attention."""
    rows, mask, present = inputs.rows, inputs.mask, inputs.present
    q = inputs.rotations[0].apply(inputs.queries)[None]
    length, tokens = q.shape[2], rows.k.shape[1]
    # Metal and CUDA have fused kernels; on the CPU the scores of all rows would be one matrix.
    tile = QUERY_TILE if mx.default_device().type == mx.DeviceType.cpu else length
    tiles = []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        # Under the causal rule nothing in this tile sees a token behind its last row.
        seen = tokens - (length - stop) if mask == "causal" else tokens
        part = mask[..., start:stop, :] if isinstance(mask, mx.array) else mask
        if present is not None:
            part = _only(present[:, :seen], q.shape[1], stop - start, mask == "causal")
        tiles.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:stop],
                rows.k[None, :, :seen],
                rows.v[None, :, :seen],
                scale=inputs.scale,
                mask=part,
                sinks=inputs.sink_logits,
            )
        )
        if tile < length:  # a lazy graph would allocate the scores of several tiles ahead
            mx.eval(tiles[-1])
    out = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
    return inputs.rotations[1].undo(out[0])


def _only(present: mx.array, query_heads: int, length: int, causal: bool) -> mx.array:
    """bool [1, Hq, L, N]: only rows that are tokens, and under the causal rule only those up to
    each of the L queries, which are the last of the N."""
    heads, tokens = present.shape
    mask = present[:, None]
    if causal:
        mask = mask & (mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens))
    else:
        mask = mx.broadcast_to(mask, (heads, length, tokens))
    return mx.repeat(mask, query_heads // heads, axis=0)[None]


def prefill_attention(
    queries: mx.array,
    rows: Rows,
    *,
    scale: float,
    mask: Mask,
    present: mx.array | None,
    sink_logits: mx.array | None,
    rotations: Rotations,
    backend: Backend,
) -> mx.array:
    """Softmax attention over all rows.

    Args:
        queries: [Hq, L, head_dim] as the model made them; if causal, the last L of the N
            tokens.
        rows: rotated keys [H, N, Dk] and values [H, N, Dv].
        scale: factor of the scores, usually head_dim ** -0.5.
        mask: None (every query sees every token), "causal", or an array over all tokens in
            order: [L, N], [1 or Hq, L, N] or [1, 1 or Hq, L, N], bool or additive.
        present: which rows are tokens, bool [H, N]; None if all are.
        sink_logits: learned logits [Hq] that take part in the softmax without a value (gpt_oss).
        rotations: of the rows; applied to the queries and undone in the output.
        backend: who computes it.

    Returns:
        [Hq, L, v_head_dim] in the dtype of the queries.

    Raises:
        ShapeError: a shape does not fit.
        DroppedTokensError: an array mask over a body that lost tokens.
    """
    query_heads, length, dim = queries.shape
    heads, tokens, _ = rows.k.shape
    most = tokens if isinstance(mask, str) else length
    if query_heads % heads or dim != rotations[0].head_dim or length > most:
        raise ShapeError(
            f"[prefill_attention] expected queries [n * {heads}, L, {rotations[0].head_dim}], "
            f"L <= {tokens} if causal, got {queries.shape}."
        )
    if rows.v.shape[:2] != (heads, tokens) or (
        present is not None and present.shape != (heads, tokens)
    ):
        raise ShapeError(
            f"[prefill_attention] expected values and tokens of keys [{heads}, {tokens}, ..], got "
            f"{rows.v.shape} and {None if present is None else present.shape}."
        )
    if present is not None and isinstance(mask, mx.array):
        raise DroppedTokensError
    return backend.prefill_attention(
        PrefillInputs(queries, rows, scale, mask, present, sink_logits, rotations)
    )
