"""Prompt cache files to save, take apart, sign anew and compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.container import PROMPT_CACHE
from leankv_mlx.codec.channels import Channels
from tests.bases import basis

HEADS, DIM = 2, 32


def rows(n: int, seed: int, dim: int = DIM, dtype: mx.Dtype = mx.float32) -> mx.array:
    """[1, HEADS, n, dim]"""
    return mx.random.normal((1, HEADS, n, dim), key=mx.random.key(seed)).astype(dtype)


def filled(
    cache: Any, n: int, seed: int = 0, dtype: mx.Dtype = mx.float32, step: int | None = None
) -> Any:
    """The cache after n more tokens, in chunks of `step`."""
    for start in range(0, n, step or n):
        size = min(step or n, n - start)
        cache.update_and_fetch(
            rows(size, seed + start, dtype=dtype), rows(size, seed + start + 1, dtype=dtype)
        )
    mx.eval(cache.state)
    return cache


def one_of_each() -> list[Any]:
    """Compressed layers with and without a body, an empty one, and every other class."""
    arrays = stock.ArraysCache(2)
    arrays[0] = rows(3, 7)
    return [
        filled(CompressedKVCache("leankv:k4v3,window=32,equalize=off"), 150),
        filled(CompressedKVCache("leankv:k3v2,window=32"), 140),
        filled(CompressedKVCache(), 30),
        CompressedKVCache("leankv:k2v2", keep_fetched=True),
        filled(stock.KVCache(), 20),
        filled(stock.QuantizedKVCache(group_size=32, bits=4), 20),
        filled(stock.RotatingKVCache(max_size=16, keep=2), 20),
        filled(stock.ChunkedKVCache(32), 20),
        filled(stock.ConcatenateKVCache(), 5),
        arrays,
        stock.CacheList(filled(stock.KVCache(), 3), stock.KVCache()),
        ragged(filled(CompressedKVCache("leankv:policy=threshold,window=32"), 300)),
        narrowed(filled(masked("leankv:k4v3,window=32,mask=some"), 140)),
        ragged(narrowed(filled(masked("leankv:policy=threshold,window=32,mask=some"), 300))),
        masked("leankv:mask=some"),
        filled(masked("leankv:k4v3,window=32,mask=some"), 140),
        filled(turned("leankv:k3v3,window=32,basis=some"), 140),
        turned("leankv:basis=some"),
        ragged(filled(turned("leankv:policy=threshold,window=32,basis=some"), 300)),
    ]


def masked(kv: str, groups: tuple[int, ...] = (1, 0)) -> CompressedKVCache:
    """A cache whose first head keeps its channels, in another order, and whose second none."""
    order = np.stack([np.random.default_rng(i).permutation(DIM) for i in range(HEADS)])
    return CompressedKVCache(kv, learned=Channels.of(order, np.array(groups)))


def turned(kv: str) -> CompressedKVCache:
    """A cache whose keys are in a basis."""
    return CompressedKVCache(kv, learned=basis(HEADS, DIM))


def narrowed(cache: CompressedKVCache) -> CompressedKVCache:
    """The cache after its prompt."""
    cache.sequence.narrow()
    return cache


def ragged(cache: CompressedKVCache) -> CompressedKVCache:
    """The cache after some slots were dropped, and others went to the low tier."""
    assert cache.layer is not None and cache.layer.body is not None
    body = cache.layer.body
    plan = body.describe().tiers.copy()
    plan[0, ::3], plan[1, :100], plan[:, 1::3] = -1, -1, 1
    body.place(plan)
    return cache


def content(value: Any) -> Any:
    """A state with its arrays as bytes, and block ids as the blocks that they name."""
    if isinstance(value, CompressedKVCache):
        state = value.state
        if state.layer is None or state.layer.body is None:
            return [type(value).__name__, content(state)]
        tiers = [[t.blocks[t.ids], *t[2:]] for t in state.layer.body.tiers if t.ids.size]
        layer = state.layer._replace(body=state.layer.body._replace(tiers=tiers))
        return [type(value).__name__, content(state._replace(layer=layer))]
    if hasattr(value, "from_state"):
        return [type(value).__name__, content(list(value.state))]
    if isinstance(value, mx.array):
        return [str(value.dtype), value.shape, bytes(memoryview(value.reshape(-1).view(mx.uint8)))]
    if isinstance(value, list | tuple):
        return [content(child) for child in value]
    return value


def taken_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def signed(header: dict[str, Any], data: bytes) -> bytes:
    """A file whose digest is right, whatever else is wrong with it."""
    header["__metadata__"]["digest"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    digest = hashlib.blake2b(whole, digest_size=32).hexdigest().encode()
    at = PROMPT_CACHE.digest_at
    return whole[:at] + digest + whole[at + 64 :]
