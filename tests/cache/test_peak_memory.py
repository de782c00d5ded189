"""Peak memory of a long prefill stays within the bound of ARCHITECTURE.md."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from leankv_mlx.kernels import resolve_backend
from leankv_mlx.kernels.prefill_attention import QUERY_TILE
from leankv_mlx.mlx_lm import attach
from tests.models import TINY

LAYERS, TOKENS = 16, 16384
DIM, HEADS, QUERY_HEADS, SIZE = 32, 2, 4, 4


def peak_of(model: nn.Module, cache: list[Any], ids: mx.array) -> int:
    """Peak bytes of one chunk, above what is there before it."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model(ids[None], cache=cache)
    mx.eval([c.state for c in cache])
    return mx.get_peak_memory() - before


def filled(model: nn.Module, tokens: int) -> list[Any]:
    """Caches of a model as after a prompt of random keys and values, without running the model."""
    cache = model.make_cache()
    for first in range(0, tokens, 2048):
        k, v = mx.random.normal((2, 1, HEADS, min(2048, tokens - first), DIM))
        cache[0].update_and_fetch(k, v)
        mx.eval(cache[0].state)
    # The others get buffers of their own with the same content.
    for c in cache[1:]:
        c.state = tree_map(lambda x: x + 0 if isinstance(x, mx.array) else x, cache[0].state)
        mx.eval(c.state)
    return cache


@pytest.mark.parametrize(
    ("chunk", "whole"),
    [
        pytest.param(512, False, id="last chunk"),
        pytest.param(2048, True, id="whole", marks=pytest.mark.slow),
    ],
)
def test_prefill_of_16k_tokens_stays_within_the_bound(chunk: int, whole: bool) -> None:
    model = TINY["llama"](head_dim=DIM, layers=LAYERS)
    ids = mx.random.randint(0, 128, (TOKENS,), key=mx.random.key(0))
    empty = peak_of(model, make_prompt_cache(model), ids[:chunk])
    peak = 0
    with attach(model):
        mx.clear_cache()
        start = mx.get_active_memory()
        cache = model.make_cache() if whole else filled(model, TOKENS - chunk)
        for first in range(0 if whole else TOKENS - chunk, TOKENS, chunk):
            before = mx.get_active_memory() - start
            peak = max(peak, before + peak_of(model, cache, ids[first : first + chunk]))
    held = sum(c.memory().allocated for c in cache)
    copy = TOKENS * HEADS * 2 * DIM * SIZE
    native = resolve_backend().name == "cpu"  # no score matrix
    scores = 0 if native else QUERY_TILE * TOKENS * QUERY_HEADS * SIZE
    print(f"peak {peak}, cache {held}, empty forward {empty}, copy {copy}, scores {scores}")
    assert held < LAYERS * copy / 5
    assert peak <= held + empty + 2 * copy + scores
