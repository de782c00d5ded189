"""Prompt cache files of whole models: our layers, and those of mlx-lm's cache classes beside them.

Only the classes listed here are stored and restored. A state from a file is checked against what
the class itself can produce, because mlx-lm takes every state as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from leankv_mlx.cache import persistence
from leankv_mlx.cache.container import has_magic
from leankv_mlx.cache.persistence import OtherClass, PromptCache
from leankv_mlx.config import BackendName

__all__ = ["PromptCache", "has_magic", "load_prompt_cache", "save_prompt_cache"]


def save_prompt_cache(
    path: str | Path, caches: Sequence[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the cache list of one sequence to a file, atomically.

    Raises:
        UnsupportedError: it holds a cache that a file cannot hold.
        CacheFileError: the file cannot be written.
    """
    persistence.save(path, caches, metadata, _others())


def load_prompt_cache(path: str | Path, backend: BackendName = "auto") -> PromptCache:
    """Read a file that `save_prompt_cache` made; the caches give bit-identical logits.

    Raises:
        CacheFileError: it is anything else, or damaged.
        BackendUnavailableError: the backend cannot run here.
    """
    return persistence.load(path, _others(), backend)


@cache
def _others() -> dict[str, OtherClass]:
    from mlx_lm.models import cache as stock

    return {
        "ArraysCache": OtherClass(stock.ArraysCache, _arrays),
        "CacheList": OtherClass(stock.CacheList, children=True),
        "ChunkedKVCache": OtherClass(stock.ChunkedKVCache, _chunked),
        "ConcatenateKVCache": OtherClass(stock.ConcatenateKVCache, _concatenated),
        "KVCache": OtherClass(stock.KVCache, _growing),
        "QuantizedKVCache": OtherClass(stock.QuantizedKVCache, _quantized),
        "RotatingKVCache": OtherClass(stock.RotatingKVCache, _rotating),
    }


def _slots(keys: Any, values: Any) -> int:
    """Slots of a layer's keys and values, [B, H, slots, D] and [B, H, slots, Dv]; 0 for none."""
    if keys is None and values is None:
        return 0
    for side in (keys, values):
        _require(isinstance(side, mx.array) and side.ndim == 4, "keys and values")
        _require(mx.issubdtype(side.dtype, mx.floating), "dtypes")
        _require(bool(mx.isfinite(side).all()), "values that are no numbers")
    _require(keys.shape[:3] == values.shape[:3], "shapes")
    return int(keys.shape[2])


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _between(low: int, value: Any, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _growing(state: list[Any]) -> None:
    keys, values, offset = state
    _require(_between(0, offset, _slots(keys, values)), "offset")


def _concatenated(state: list[Any]) -> None:
    keys, values = state
    _require(_slots(keys, values) > 0, "keys and values")


def _chunked(state: list[Any]) -> None:
    keys, values, offset, chunk_size, start = state
    _require(_between(1, chunk_size, 1 << 31), "chunk size")
    _require(_between(0, start, 1 << 31), "start position")
    _require(_between(start, offset, start + _slots(keys, values)), "offset")


def _rotating(state: list[Any]) -> None:
    keys, values, offset, keep, max_size, index = state
    slots = _slots(keys, values)
    _require(_between(1, max_size, 1 << 31) and _between(0, keep, max_size - 1), "sizes")
    _require(_between(0, index, slots), "index")
    _require(_between(index, offset, 1 << 31) and (slots > 0 or offset == 0), "offset")


def _quantized(state: list[Any]) -> None:
    keys, values, offset, group_size, bits = state
    _require(_between(1, group_size, 1 << 10) and _between(1, bits, 32), "bits")
    sides = [side for side in (keys, values) if side is not None]
    _require(len(sides) != 1, "keys and values")
    slots = 0
    for side in sides:
        _require(isinstance(side, list) and len(side) == 3, "keys and values")
        _require(all(isinstance(array, mx.array) for array in side), "keys and values")
        codes, scales, biases = side
        _require(scales.shape == biases.shape and scales.dtype == biases.dtype, "scales")
        slots = _slots(scales, biases)
        channels = scales.shape[-1] * group_size
        words = (*scales.shape[:3], channels * bits // 32)
        _require(codes.shape == words and codes.dtype == mx.uint32, "codes")
    if sides:
        _require(keys[0].shape[:3] == values[0].shape[:3], "shapes")
    _require(_between(0, offset, slots), "offset")


def _arrays(state: list[Any]) -> None:
    arrays, left_padding, lengths = state
    _require(isinstance(arrays, list) and bool(arrays), "arrays")
    for array in (*arrays, left_padding, lengths):
        _require(array is None or isinstance(array, mx.array), "arrays")
    batches = {array.shape[:1] for array in arrays if array is not None}
    _require(len(batches) < 2 and () not in batches, "shapes")
