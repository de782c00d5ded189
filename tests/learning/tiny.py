"""Something that a small random model learns in no time. Import as `from tests.learning`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn

from leankv_mlx.cache.masks import Masks
from leankv_mlx.learning.beginning import read
from leankv_mlx.learning.gates import logits
from leankv_mlx.learning.lessons import Lesson, Lessons
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.patches import asking
from tests.models import VOCAB


def drawn(count: int, seed: int = 0) -> list[int]:
    """Tokens of a text."""
    found: list[int] = np.random.default_rng(seed).integers(1, VOCAB, count).tolist()
    return found


def masks(layers: int, heads: int, dim: int, ratio: float = 0.5, seed: int = 0) -> Masks:
    """A mask under which the first heads of the first and the last layer keep nothing."""
    draw = np.random.default_rng(seed)
    alphas = draw.uniform(0.4, 1, (layers, heads, dim)).astype(np.float32)
    alphas[:, 0] *= np.where(np.arange(layers) % 2, 1, 0.1)[:, None].astype(np.float32)
    return Masks.of(alphas, ratio)


def loaded(model: nn.Module) -> LoadedModel:
    """With nothing beside the model."""
    return LoadedModel(model, None, {}, Path("tiny"))


def lessons(model: nn.Module, seed: int = 0) -> Lessons:
    """A few of both kinds."""
    tokens, made = drawn(320, seed), []
    with asking(model):
        for beginning in read(model, tokens, [180, 260]):
            for length, first in ((12, 5), (9, 0)):
                behind = tuple(tokens[beginning.tokens : beginning.tokens + length])
                said = mx.softmax(logits(model, beginning, behind, None)[first:], axis=-1)
                likely = mx.broadcast_to(mx.arange(said.shape[-1]), said.shape)
                made.append(Lesson(beginning, behind, first, likely, said))
    return Lessons(tuple(made[::2]), tuple(made[1::2]))
