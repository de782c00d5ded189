"""Attention of many new tokens over a working copy of one layer."""

import mlx.core as mx

from leankv_mlx.attention.view import View
from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.kernels import Mask, Rows
from leankv_mlx.kernels.prefill_attention import prefill_attention


def attend_rows(
    queries: mx.array,
    rows: Rows,
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
) -> mx.array:
    """queries: [1, Hq, L, head_dim], the last L tokens of the view; rows: what `view.rows` gave ->
    [1, Hq, L, v_head_dim].

    Raises:
        DroppedTokensError: an array mask over a body that lost tokens.
    """
    # Two tiers are out of order, and heads that all lost the same leave no gaps.
    whole = rows.k.shape[1] if len(view.bodies) <= 1 else -1
    if isinstance(mask, mx.array) and mask.shape[-1] != whole:
        raise DroppedTokensError
    out = prefill_attention(
        queries[0],
        rows,
        scale=scale,
        mask=mask,
        present=view.present(),
        sink_logits=sink_logits,
        rotations=view.rotations,
        backend=view.backend,
    )
    return out[None]
