"""A decode step of several sequences at once: what each of them gets alone, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache
from leankv_mlx.cache import together as module
from leankv_mlx.kernels import available_backends

HEADS, GROUP, DIM = 2, 3, 64
BACKENDS = [name for name, reason in available_backends().items() if reason is None]


def drawn(seed: int, heads: int, tokens: int, dtype: mx.Dtype) -> mx.array:
    draw = np.random.default_rng(seed)
    return mx.array(draw.standard_normal((1, heads, tokens, DIM), np.float32)).astype(dtype)


def step(cache: Any, seeds: Sequence[int], tokens: int, dtype: mx.Dtype) -> mx.array:
    """Queries, keys and values of a row come of its seed."""
    queries, keys, values = (
        mx.concatenate([drawn(10 * seed + i, heads, tokens, dtype) for seed in seeds])
        for i, heads in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    mask = None if tokens == 1 else "causal"
    out: mx.array = cache.update(keys, values).attend(queries, scale=0.125, mask=mask)
    mx.eval(out)
    return out


def begun(kv: str, lengths: Sequence[int], dtype: mx.Dtype) -> list[CompressedKVCache]:
    caches = [CompressedKVCache(kv) for _ in lengths]
    for i, (cache, tokens) in enumerate(zip(caches, lengths, strict=True)):
        if tokens:
            step(cache, [i], tokens, dtype)
    return caches


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each operation was asked for."""
    asked: list[int] = []
    ours = module.decode_attention_batch

    def counted(queries: mx.array, *args: Any, **kwargs: Any) -> Any:
        asked.append(queries.shape[0])
        return ours(queries, *args, **kwargs)

    monkeypatch.setattr(module, "decode_attention_batch", counted)
    return asked


@pytest.mark.parametrize(
    "kv", ["leankv", "leankv:policy=budget", "leankv:equalize=off", "leankv:rotation=none"]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gets_the_bits_that_it_gets_alone(
    backend: str, dtype: mx.Dtype, kv: str, operations: list[int]
) -> None:
    spec = f"{kv},backend={backend}" if ":" in kv else f"{kv}:backend={backend}"
    lengths = (300, 20, 0, 130)  # two of them have no body, and no scales, at first
    alone, rows = begun(spec, lengths, dtype), begun(spec, lengths, dtype)
    batch = BatchedKVCache(rows)
    for i in range(40):  # the window is flushed meanwhile
        tokens = 3 if i == 5 else 1
        seeds = [100 + 7 * i + row for row in range(4)]
        both = step(batch, seeds, tokens, dtype)
        for row, cache in enumerate(alone):
            assert mx.array_equal(both[row], step(cache, seeds[row : row + 1], tokens, dtype)[0])
    assert operations == [4] * 40
    for one, other in zip(alone, rows, strict=True):
        assert one.memory() == other.memory() and one.fused_calls == other.fused_calls


def test_sequences_of_other_kinds_are_attended_to_one_by_one(operations: list[int]) -> None:
    kinds = "leankv:k8v8", "leankv:k4v4"
    alone = [begun(kv, [200], mx.float32)[0] for kv in kinds]
    batch = BatchedKVCache([begun(kv, [200], mx.float32)[0] for kv in kinds])
    for i in range(3):
        both = step(batch, [i, i], 1, mx.float32)
        for row, cache in enumerate(alone):
            assert mx.array_equal(both[row], step(cache, [i], 1, mx.float32)[0])
    assert operations == []


def test_one_sequence_is_a_batch(operations: list[int]) -> None:
    alone, row = (begun("leankv", [200], mx.float32)[0] for _ in range(2))
    batch = BatchedKVCache([row])
    assert mx.array_equal(step(batch, [1], 1, mx.float32), step(alone, [1], 1, mx.float32))
    assert operations == [1]
