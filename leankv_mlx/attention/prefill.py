"""Attention of many new tokens over a working copy of one layer."""

import mlx.core as mx

from leankv_mlx.attention.view import View
from leankv_mlx.errors import UnsupportedError
from leankv_mlx.kernels import Mask, Rows

QUERY_TILE = 256
"""Query rows at a time where MLX builds the whole score matrix."""


def attend_rows(
    queries: mx.array,
    rows: Rows,
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
) -> mx.array:
    """Attention over rotated rows.

    Args:
        queries: [1, Hq, L, head_dim], the last L of the N tokens.
        rows: rotated keys [H, N, Dk] and values [H, N, Dv].
        view: whose rotations are used.
        scale, mask, sink_logits: as in `kernels.decode_attention`.

    Returns:
        [1, Hq, L, v_head_dim] in the dtype of the queries.

    Raises:
        UnsupportedError: an array mask over a body that lost tokens.
    """
    q = view.rotations[0].apply(queries)
    length, tokens = q.shape[2], rows.k.shape[1]
    present = view.present()
    in_order = present is None and len(view.bodies) <= 1
    if isinstance(mask, mx.array) and not (in_order and mask.shape[-1] == tokens):
        raise UnsupportedError(
            "this model attends with an array mask, which does not go with a policy that drops "
            "tokens; use policy=keep_all."
        )
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
                scale=scale,
                mask=part,
                sinks=sink_logits,
            )
        )
        if tile < length:  # a lazy graph would allocate the scores of several tiles ahead
            mx.eval(tiles[-1])
    out = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
    return view.rotations[1].undo(out)


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
