"""Attention of up to 8 new tokens, straight from the codes."""

import mlx.core as mx

from leankv_mlx.attention.view import View
from leankv_mlx.kernels import Attention, Mask
from leankv_mlx.kernels.decode_attention import decode_attention


def attend_codes(
    queries: mx.array,
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
) -> Attention:
    """queries: [1, Hq, L, head_dim], the last L tokens of the view -> [1, Hq, L, v_head_dim]; the
    log-sum-exp of their scores, float32 [Hq, L], and what was read come with it."""
    attention = decode_attention(
        mx.squeeze(queries, 0),  # an index would be a gather
        view.bodies,
        view.exact,
        view.centers,
        scale=scale,
        sinks=view.sinks,
        mask=mask,
        sink_logits=sink_logits,
        backend=view.backend,
        rotations=view.rotations,
        skip=view.skip,
    )
    return attention._replace(out=attention.out[None])
