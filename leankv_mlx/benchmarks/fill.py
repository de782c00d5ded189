"""Caches with random content, without running a model over a long prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from leankv_mlx.benchmarks.shapes import Heads

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
STOCK = {"kv_bits_8": 8, "kv_bits_4": 4}
"""Baselines by name: the uncompressed cache per dtype, and mlx-lm's quantized ones."""

_CHUNK = 2048


def fill(caches: Iterable[Any], heads: Heads, tokens: int, dtype: mx.Dtype) -> None:
    """Give every cache `tokens` tokens through its own update, as prefill would.

    All get the same chunk again and again: nothing here depends on what is in it.
    """
    shape = (1, heads.kv, min(tokens, _CHUNK), heads.dim)
    chunk = [mx.random.normal(shape).astype(dtype) for _ in range(2)]
    mx.eval(chunk)
    for cache in caches:
        for start in range(0, tokens, _CHUNK):
            n = min(_CHUNK, tokens - start)
            cache.update_and_fetch(*(x[:, :, :n] for x in chunk))
            wait([cache])


def wait(caches: Iterable[Any]) -> None:
    """Compute everything that the caches hold."""
    mx.eval([cache.state for cache in caches])
