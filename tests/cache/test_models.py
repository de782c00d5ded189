"""Whole models on the compressed cache equal the same models on a NumPy round trip of K and V.

fp32 is compared at the logits. In half precision rounding alone moves the logits of these models by
more than the tolerance (0.4% from fp32 to fp16, uncompressed; layers amplify it), so there
attention is compared call by call on the same inputs. (gpt_oss has no half precision on the CPU.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache, owner_of
from leankv_mlx.mlx_lm import attach
from tests.cache.harness import (
    PROMPT,
    STEPS,
    chunks,
    compressed_cache,
    feed,
    oracles,
    relative,
    tokens,
)
from tests.models import TINY
from tests.oracle import OracleCache

IDS = tokens(sum(PROMPT + STEPS))
PIECES = chunks(IDS, PROMPT + STEPS)
KV = "leankv:k4v3,sink_tokens=4,window=64"


def check_against_oracle(name: str, head_dim: int, fused: bool, kv: str = KV) -> None:
    model = TINY[name](head_dim=head_dim)
    with attach(model, kv):
        expected = fused and TINY[name].fused
        cache = model.make_cache()
        if fused:
            ours = feed(model, cache, PIECES)
    if not fused:
        cache = compressed_cache(model, kv)
        ours = feed(model, cache, PIECES)
    compressed = [c for c in cache if isinstance(c, CompressedKVCache)]
    assert [isinstance(c, CompressedKVCache) for c in cache] == [
        i in TINY[name].compressed for i in range(len(cache))
    ]
    assert all(bool(c.fused_calls) == expected for c in compressed)
    assert all(c.memory().codes for c in compressed)
    expected_cache = oracles(cache, make_prompt_cache(model))
    theirs = feed(model, expected_cache, PIECES)
    assert relative(ours, theirs) < 1e-5
    for oracle in expected_cache:
        if isinstance(oracle, OracleCache):
            # At 8 bits two factors are often equally good, and another scale moves many codes.
            assert oracle.compared and oracle.ties < (0.1 if "8" in kv else 0.002)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "fallback"])
@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_model(name: str, fused: bool) -> None:
    check_against_oracle(name, 64, fused)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "fallback"])
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_every_head_dim(head_dim: int, fused: bool) -> None:
    check_against_oracle("llama", head_dim, fused)


@pytest.mark.parametrize(
    "kv",
    ["k2v2", "k8v8", "k3v4,sink_tokens=0,window=32", "k4v4,sink_tokens=40,window=100"],
)
def test_other_settings(kv: str) -> None:
    check_against_oracle("llama", 64, True, f"leankv:{kv}")


class Watched(CompressedKVCache):
    """Compares every fetch and every attention with the oracle on the same inputs."""

    def __init__(self, config: Any, keep_fetched: bool = False) -> None:
        super().__init__(config, keep_fetched)
        self.oracle = OracleCache(self)
        self.worst_rows = self.worst_attention = 0.0
        self.checked = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        fetched = super().update_and_fetch(keys, values)
        expected = self.oracle.update_and_fetch(keys.astype(mx.float32), values.astype(mx.float32))
        for ours, theirs in zip(fetched, expected, strict=True):
            error = relative(np.array(ours.astype(mx.float32)), np.array(theirs))
            self.worst_rows = max(self.worst_rows, error)
        return fetched


def exact_attention(
    queries: mx.array, keys: mx.array, values: mx.array, **kwargs: Any
) -> NDArray[Any]:
    arrays = (x.astype(mx.float32) for x in (queries, keys, values))
    return np.array(mx.fast.scaled_dot_product_attention(*arrays, **kwargs))


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v2"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float16, 1e-3), (mx.bfloat16, 1e-2)], ids=["fp16", "bf16"]
)
def test_half_precision(
    name: str, dtype: mx.Dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY[name](dtype=dtype)
    with attach(model, KV):
        cache = model.make_cache()
        for i, ours in enumerate(cache):
            if isinstance(ours, CompressedKVCache):
                cache[i] = Watched(ours.config)
        watched = [c for c in cache if isinstance(c, Watched)]
        module = __import__(type(model).__module__, fromlist=["x"])
        attention: Callable[..., mx.array] = module.scaled_dot_product_attention

        def compared(
            q: mx.array, k: mx.array, v: mx.array, cache: Any, scale: float, mask: Any,
            sinks: mx.array | None = None,
        ) -> mx.array:  # fmt: skip
            ours = attention(q, k, v, cache, scale, mask, sinks=sinks)
            if owner_of(k, v):
                logits = None if sinks is None else sinks.astype(mx.float32)
                rows = cache.oracle.keys_and_values()
                exact = exact_attention(q, *rows, scale=scale, mask=mask, sinks=logits)
                error = relative(np.array(ours.astype(mx.float32)), exact)
                cache.worst_attention = max(cache.worst_attention, error)
                cache.checked += 1
            return ours

        with monkeypatch.context() as patch:  # ends before the attachment does
            patch.setattr(module, "scaled_dot_product_attention", compared)
            feed(model, cache, PIECES)
    for c in watched:
        assert c.checked == len(PIECES)
        assert c.worst_attention < tolerance
        assert c.worst_rows < tolerance


def test_a_batch_is_refused() -> None:
    from leankv_mlx.errors import UnsupportedError

    model = TINY["llama"]()
    with attach(model, KV), pytest.raises(UnsupportedError, match="a batch of 2"):
        model(IDS[:20].reshape(2, 10), cache=model.make_cache())
