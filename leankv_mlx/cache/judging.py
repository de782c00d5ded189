"""What the last queries of a layer make of its tokens."""

from __future__ import annotations

import mlx.core as mx

from leankv_mlx.cache.layer import Layer
from leankv_mlx.sparsity import Exact, Observed, received, significance


def judge(layer: Layer) -> tuple[mx.array, mx.array]:
    """Significance of all stored tokens, lazy [H, S], and of the exact rows, [H, E]."""
    observed = _observed(layer)
    assert layer.body is not None and layer.observations is not None and observed is not None
    exact = Exact(layer.exact.k, layer.exact_positions)
    of_stored, of_exact, lse = significance(
        observed, layer.body.stored(), exact, layer.body.centers, layer.backend
    )
    layer.observations.settle(lse)
    view = layer.view()
    scores = mx.zeros((layer.shape.heads, view.slots))
    for start, own in zip(view.starts, of_stored, strict=True):
        scores[:, start : start + own.shape[1]] += own  # 0 for heads of other tiers
    return scores, of_exact


def judge_window(layer: Layer) -> mx.array | None:
    """Significance of the exact rows, lazy [H, E], by what the queries saw when they came; None if
    that is not known."""
    observed = _observed(layer)
    if observed is None or observed.lse is None:
        return None
    return received(observed, Exact(layer.exact.k, layer.exact_positions))


def _observed(layer: Layer) -> Observed | None:
    if layer.observations is None:
        return None
    return layer.observations.latest(lambda queries: layer.space.rotated(queries[None])[0])
