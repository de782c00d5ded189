"""mlx-lm's speculative decoding on the compressed cache, call by call beside the oracle."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.generate import speculative_generate_step

from leankv_mlx.mlx_lm import attach
from tests.cache.harness import oracles, tokens
from tests.models import TINY


class Beside:
    """A model that also runs the oracle on every call and keeps the largest difference."""

    def __init__(self, model: nn.Module, cache: list[Any]) -> None:
        self.model, self.layers = model, model.layers
        self.oracles = oracles(cache, cache)
        self.worst, self.sizes, self.trimmed = 0.0, [], 0

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        for ours, oracle in zip(cache, self.oracles, strict=True):
            self.trimmed += oracle.offset - ours.offset
            oracle.trim(oracle.offset - ours.offset)
        logits = self.model(ids, cache=cache)
        expected = np.array(self.model(ids, cache=self.oracles))
        difference = np.abs(np.array(logits) - expected).max() / np.abs(expected).max()
        self.worst = max(self.worst, float(difference))
        self.sizes.append(ids.shape[1])
        return logits


@pytest.mark.parametrize("noise", [0.0, 0.02], ids=["good draft", "poor draft"])
def test_speculative_decoding_equals_the_oracle(noise: float) -> None:
    model, draft = TINY["llama"](), TINY["llama"]()
    draft.update(
        tree_map(lambda w: w + noise * mx.random.normal(w.shape, key=mx.random.key(0)),
                 draft.parameters())
    )  # fmt: skip
    with attach(model, "leankv:window=32"), attach(draft, "leankv:window=32"):
        main, drafts = model.make_cache(), draft.make_cache()
        beside = Beside(model, main)
        steps = speculative_generate_step(
            tokens(150), beside, draft, num_draft_tokens=4, max_tokens=80,
            prompt_cache=[*main, *drafts],
        )  # fmt: skip
        assert len(list(steps)) == 80
    assert beside.worst < 1e-4
    assert max(beside.sizes[1:]) == 5  # drafts were verified in one call
    assert beside.trimmed > 20 or not noise
    assert main[0].memory().codes
