"""Bytes that the caches of a model hold, counted from their buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.cache import CompressedKVCache, entries


@dataclass(frozen=True, slots=True)
class Usage:
    """Keys and values of one model; recurrent states are in none of the numbers.

    Attributes:
        tokens: tokens seen; of several sequences the most that one has.
        used: bytes in use; what sequences share counts in each.
        fp16: bytes that the same keys and values take at two bytes an element.
        allocated: bytes of the buffers, unused space included.
    """

    tokens: int = 0
    used: int = 0
    fp16: int = 0
    allocated: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller than fp16; 1.0 for an empty cache."""
        return self.fp16 / self.used if self.used else 1.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            max(self.tokens, other.tokens),
            self.used + other.used,
            self.fp16 + other.fp16,
            self.allocated + other.allocated,
        )


def summary_line(usage: Usage, backend: str, weights_read: float = 1.0) -> str:
    """`leankv: N tokens, KV X MB (fp16 Y MB), R.RRx, backend B`, and `weights read P%` where a step
    did not read all."""
    line = (
        f"leankv: {usage.tokens} tokens, KV {usage.used / 1e6:.2f} MB "
        f"(fp16 {usage.fp16 / 1e6:.2f} MB), {usage.ratio:.2f}x, backend {backend}"
    )
    return line if weights_read == 1 else f"{line}, weights read {weights_read:.0%}"


def measure(caches: Iterable[Any]) -> Usage:
    """Sum over the entries of a cache list."""
    return sum(map(_measure, entries(caches)), Usage())


def _measure(cache: Any) -> Usage:
    if isinstance(cache, CompressedKVCache):
        memory = cache.memory()
        return Usage(cache.offset, memory.used, cache.fp16_nbytes, memory.allocated)
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if keys is None or values is None:
        return Usage()
    return sum((_stock(cache, x) for x in (keys, values)), Usage())


def _stock(cache: Any, side: Any) -> Usage:
    """Keys or values of one of mlx-lm's caches: one array, or (codes, scales, biases); of several
    sequences, `offset` is an array."""
    arrays: list[mx.array] = list(side) if isinstance(side, list | tuple) else [side]
    allocated = sum(array.nbytes for array in arrays)
    rows, _, slots = arrays[0].shape[:3]
    offsets: list[int] = np.array(cache.offset).reshape(-1).tolist()
    held = sum(min(offset, slots) for offset in offsets)  # a rotating one has seen more than that
    bits = getattr(cache, "bits", None)
    elements = arrays[0].size * (32 // bits if bits else 1)
    seen, there = max(offsets, default=0), rows * slots
    if not there:
        return Usage(seen)
    return Usage(seen, allocated * held // there, 2 * elements * held // there, allocated)
