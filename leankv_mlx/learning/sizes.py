"""What channels seem to be worth without learning: masks to compare a learned one with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.evaluation.masks import SizeSums
from leankv_mlx.evaluation.tasks import seeded
from leankv_mlx.learning.beginning import places_of
from leankv_mlx.learning.lessons import Material, text_of
from leankv_mlx.mlx_lm.attachment import own_caches
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.mlx_lm.watching import watched

By = Literal["learned", "keys", "queries-keys", "random"]
"""By learning; by the size of the keys after RoPE, or by that times the size of the queries; or by
chance."""


def worth_by(
    by: By, loaded: LoadedModel, shapes: Sequence[tuple[int, int]], material: Material
) -> NDArray[np.float32]:
    """What each channel is worth, float32 [layers, H, head_dim], 0 to 1.

    Args:
        by: not by learning.
        shapes: KV heads and head_dim of each layer.
    """
    if by == "random":
        rng = np.random.default_rng(material.seed)
        return rng.random((len(shapes), *shapes[0]), np.float32)
    tokens = text_of(loaded, material, seeded("train", "sizes", material.seed))
    caches = own_caches(loaded.model)
    sums = SizeSums(places_of(loaded.model))
    with watched(loaded.model, caches, sums.add):
        prefill(loaded.model, tokens, caches)
    sizes = sums.sizes(len(tokens))
    worth = sizes.keys * sizes.queries if by == "queries-keys" else sizes.keys
    scaled: NDArray[np.float32] = (worth / worth.max()).astype(np.float32)
    return scaled
