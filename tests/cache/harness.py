"""Runs of tiny models with the compressed cache beside the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.mlx_lm import attach
from tests.oracle import OracleCache

PROMPT = (150, 90, 7)
"""A prompt in chunks; the last one is of decode size."""
STEPS = (*(1,) * 36, 8, 3, 40)
"""Single tokens past a flush, draft-sized steps, and a further prompt."""


def tokens(n: int, seed: int = 1) -> mx.array:
    """Random token ids, [n]."""
    return mx.random.randint(0, 128, (n,), key=mx.random.key(seed))


def chunks(ids: mx.array, sizes: Sequence[int]) -> list[mx.array]:
    """The first sum(sizes) ids in pieces."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [ids[a:b] for a, b in pairwise(ends)]


def feed(model: nn.Module, cache: list[Any], pieces: Sequence[mx.array]) -> NDArray[Any]:
    """Logits of all pieces, float32 [N, vocab]."""
    out = []
    for piece in pieces:
        logits = model(piece[None], cache=cache)
        mx.eval(logits, [c.state for c in cache])
        out.append(np.array(logits[0].astype(mx.float32)))
    return np.concatenate(out)


def oracles(cache: list[Any], fresh: list[Any]) -> list[Any]:
    """An oracle for every compressed entry; the model's own fresh caches for the rest."""
    return [
        OracleCache(ours) if isinstance(ours, CompressedKVCache) else other
        for ours, other in zip(cache, fresh, strict=True)
    ]


def compressed_cache(model: nn.Module, kv: str) -> list[Any]:
    """The cache list that `attach` would give the model; attention is not patched afterwards."""
    with attach(model, kv):
        made: list[Any] = model.make_cache()
    return made


def relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Norm of the difference in units of the norm of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
