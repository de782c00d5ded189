"""What benchmarks compare with: mlx-lm's own caches, and its models without trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx import nn


def random_model(config: Mapping[str, Any], dtype: mx.Dtype) -> nn.Module:
    """A model of mlx-lm with the weights it starts with, for timing.

    Args:
        config: as in config.json; `model_type` names a module of `mlx_lm.models`.
    """
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(dict(config)))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def hidden_states(model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
    """What the last layer gives for tokens [1, N]: prefill does not need their logits."""
    states: mx.array = model.model(tokens, cache=caches)
    return states


def stock_cache(bits: int | None = None) -> Any:
    """mlx-lm's cache of one layer: uncompressed, or with `kv_bits`."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    return KVCache() if bits is None else QuantizedKVCache(bits=bits)


def stock_store(size: int) -> Any:
    """mlx-lm's store of so many prompts."""
    from mlx_lm.models.cache import LRUPromptCache

    return LRUPromptCache(size)


def stock_attention(queries: mx.array, cache: Any, scale: float) -> mx.array:
    """Attention of one token's queries [1, Hq, 1, D] over a cache, as mlx-lm computes it."""
    from mlx_lm.models.base import scaled_dot_product_attention

    keys, values = cache.keys_and_values()
    out: mx.array = scaled_dot_product_attention(queries, keys, values, cache, scale, None)
    return out
