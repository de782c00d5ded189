"""What the bundled model's cache costs."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from leankv_mlx.blocks.pool import GROWTH_STEP
from leankv_mlx.cache import CacheMemory, CompressedKVCache
from leankv_mlx.resources import demo_model

TOKENS = 4096


@pytest.mark.parametrize("last_step", [0, 31])
def test_leankv_takes_at_most_4_6_bits_per_element_at_4k_tokens(last_step: int) -> None:
    config = json.loads((demo_model() / "config.json").read_text())
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    total, growth = CacheMemory(), 0
    for layer in range(config["num_hidden_layers"]):
        cache = CompressedKVCache("leankv")
        k, v = mx.random.normal((2, 1, heads, TOKENS, dim), key=mx.random.key(layer))
        k, v = k.astype(mx.bfloat16), v.astype(mx.bfloat16)
        prompt = TOKENS - last_step  # the window is fullest just before a flush
        cache.update_and_fetch(k[:, :, :prompt], v[:, :, :prompt])
        for i in range(prompt, TOKENS):
            cache.update_and_fetch(k[:, :, i : i + 1], v[:, :, i : i + 1])
        mx.eval(cache.state)
        total += cache.memory()
        growth += GROWTH_STEP * cache.view().tiers[0].pool.shape[1] * 4
    elements = config["num_hidden_layers"] * TOKENS * heads * 2 * dim
    assert 8 * total.used / elements <= 4.6
    assert total.allocated <= 1.15 * total.used + growth
