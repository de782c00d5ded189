"""Layers whose keys are in a learned basis: attention, batches, copies, trims, files, bytes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache
from leankv_mlx.cache import together as module
from leankv_mlx.cache.memory import planned
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.codec.basis import Basis
from leankv_mlx.errors import ConfigError, DroppedTokensError
from leankv_mlx.kernels import available_backends
from leankv_mlx.kernels.dequantize import dequantize
from leankv_mlx.policies import LOW
from tests.bases import basis
from tests.cache.prompt_files import content

HEADS, GROUP, DIM, V_DIM = 2, 3, 64, 32
CONDITION = 30.0
BACKENDS = [name for name in ("reference", "cpu") if available_backends()[name] is None]

Array = NDArray[np.float32]


def stretched(seed: int = 0) -> Basis:
    """That of keys and queries from `drawn`: both have the same size in it."""
    return basis(HEADS, DIM, CONDITION, seed)


def drawn(seed: int, tokens: int) -> list[mx.array]:
    """Queries, keys and values of a call, [1, heads, tokens, dim]: keys whose largest directions
    are those that no query looks at."""
    draw = np.random.default_rng(seed)
    q, k, v = (
        draw.standard_normal((heads, tokens, dim)).astype(np.float32)
        for heads, dim in ((HEADS * GROUP, DIM), (HEADS, DIM), (HEADS, V_DIM))
    )
    metric = np.array(stretched().matrix).astype(np.float32)
    k = k @ np.linalg.inv(metric).swapaxes(1, 2)
    q = np.einsum("hgtd,hde->hgte", q.reshape(HEADS, GROUP, tokens, DIM), metric)
    arrays = k[None] + 3, q.reshape(1, HEADS * GROUP, tokens, DIM), v[None]
    k, q, v = (mx.array(x.astype(np.float32)) for x in arrays)
    return [q, k, v]


def cache(kv: str = "k4v4", of: Basis | None = None) -> CompressedKVCache:
    found = of or stretched()
    return CompressedKVCache(f"leankv:{kv},window=32,basis=mine", learned=found)


class Run:
    """A cache, and all that came to it."""

    def __init__(self, held: CompressedKVCache) -> None:
        self.cache = held
        self.keys, self.values = (np.zeros((HEADS, 0, d), np.float32) for d in (DIM, V_DIM))

    def step(self, tokens: int, seed: int) -> float:
        """How far attention of new tokens is from that over all tokens as they came."""
        q, k, v = drawn(seed, tokens)
        fetch = self.cache.update(k, v)
        out = np.array(fetch.attend(q, scale=0.1, mask="causal" if tokens > 1 else None)[0])
        self.keys = np.concatenate([self.keys, np.array(k[0])], axis=1)
        self.values = np.concatenate([self.values, np.array(v[0])], axis=1)
        wanted = self.exact(np.array(q[0]))
        return float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))

    def exact(self, queries: Array) -> Array:
        length, total = queries.shape[1], self.keys.shape[1]
        keys, values = (np.repeat(x, GROUP, axis=0) for x in (self.keys, self.values))
        scores = 0.1 * queries @ keys.swapaxes(1, 2)
        later = np.arange(total) > np.arange(total - length, total)[:, None]
        scores = np.where(later, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found: Array = weights @ values / weights.sum(-1, keepdims=True)
        return found


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_that_over_the_keys_as_they_came(backend: str, rotation: str) -> None:
    run = Run(cache(f"k8v8,backend={backend},rotation={rotation}"))
    errors = [run.step(n, seed) for seed, n in enumerate((20, 150, 1, 3, 90, *(1,) * 40))]
    assert errors[0] < 1e-5 and max(errors) < 0.03
    keys, values = run.cache.keys_and_values()
    for found, wanted in ((keys, run.keys), (values, run.values)):
        assert np.linalg.norm(np.array(found[0]) - wanted) < 0.03 * np.linalg.norm(wanted)
    assert run.cache.layer is not None and run.cache.layer.space.equalizer is None


def test_few_bits_lose_less() -> None:
    """Where the directions of keys and queries say so."""
    plain = CompressedKVCache("leankv:k3v8,window=32,equalize=off")
    equal = CompressedKVCache("leankv:k3v8,window=32")
    errors = []
    for held in (cache("k3v8"), equal, plain):
        run = Run(held)
        run.step(500, 0)
        errors.append(run.step(8, 1))
    assert errors[0] < 0.5 * min(errors[1:])


def test_nothing_is_lost_to_16_bits_twice() -> None:
    """Keys of 16 bits are turned and rotated in float32."""
    q, k, v = (x.astype(mx.bfloat16) for x in drawn(0, 20))
    held = cache()
    out = held.update(k, v).attend(q, scale=0.1, mask="causal")
    run = Run(held)
    run.keys, run.values = (np.array(x[0].astype(mx.float32)) for x in (k, v))
    wanted = run.exact(np.array(q[0].astype(mx.float32)))
    assert out.dtype == mx.bfloat16
    error = np.array(out[0].astype(mx.float32)) - wanted
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("kv", ["k4v4", "k4v4,policy=budget"])
def test_each_of_a_batch_gets_the_bits_that_it_gets_alone(
    kv: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ours = module.decode_attention_batch

    def counted(queries: mx.array, *args: Any, **kwargs: Any) -> Any:
        asked.append(queries.shape[0])
        return ours(queries, *args, **kwargs)

    monkeypatch.setattr(module, "decode_attention_batch", counted)
    alone, rows = ([cache(kv, stretched()) for _ in range(3)] for _ in range(2))
    for held in (alone, rows):
        for i, tokens in enumerate((200, 20, 70)):
            q, k, v = (x.astype(dtype) for x in drawn(i, tokens))
            mx.eval(held[i].update(k, v).attend(q, scale=0.1, mask="causal"))
    batch = BatchedKVCache(rows)
    for i in range(36):  # the window is flushed meanwhile
        parts = [[x.astype(dtype) for x in drawn(10 * i + row, 1)] for row in range(3)]
        q, k, v = (mx.concatenate(side) for side in zip(*parts, strict=True))
        both = batch.update(k, v).attend(q, scale=0.1, mask=None)
        for row, (held, (q, k, v)) in enumerate(zip(alone, parts, strict=True)):
            one = held.update(k, v).attend(q, scale=0.1, mask=None)
            assert mx.array_equal(both[row], one[0])
    assert asked == [3] * 36  # equal bases are the same for an operation
    for one, other in zip(alone, rows, strict=True):
        assert content(one) == content(other) and one.memory() == other.memory()


def test_other_bases_are_not_taken_together() -> None:
    rows = [cache(), cache(of=stretched(1))]
    for held in rows:
        q, k, v = drawn(0, 100)
        held.update(k, v)
    alone, batch = deepcopy(rows), BatchedKVCache(rows)
    q, k, v = (mx.concatenate([x, x]) for x in drawn(1, 1))
    both = batch.update(k, v).attend(q, scale=0.1, mask=None)
    for row, held in enumerate(alone):
        one = held.update(k[:1], v[:1]).attend(q[:1], scale=0.1, mask=None)
        assert mx.array_equal(both[row], one[0])
    assert not mx.array_equal(both[0], both[1])


def test_copies_and_trims_stay_in_the_basis() -> None:
    run = Run(cache("k8v8"))
    for seed, tokens in enumerate((150, 1, 1)):
        run.step(tokens, seed)
    copy = Run(deepcopy(run.cache))
    copy.keys, copy.values = run.keys, run.values
    assert copy.cache.learned is run.cache.learned
    for n in (10, 60, 82):  # within the window, into the body, down to nothing
        copy.cache.trim(n)
        copy.keys, copy.values = (x[:, : x.shape[1] - n] for x in (copy.keys, copy.values))
        again = deepcopy(copy)
        assert max(again.step(size, 7) for size in (120, 1)) < 0.03
    assert copy.cache.offset == 0
    assert run.step(1, 9) < 0.03


@pytest.mark.parametrize("tokens", [0, 20, 200])
def test_a_file_has_all_of_it_and_needs_no_other(tokens: int, tmp_path: Path) -> None:
    held = cache("k3v3")
    if tokens:
        q, k, v = drawn(0, tokens)
        mx.eval(held.update(k, v).attend(q, scale=0.1, mask="causal"))
    save(tmp_path / "cache", [held])
    (again,) = load(tmp_path / "cache").caches
    assert content(again) == content(held) and again.learned == held.learned
    assert again.config == held.config and again.memory().used == held.memory().used
    q, k, v = drawn(1, 1)
    one, other = (each.update(k, v).attend(q, scale=0.1, mask=None) for each in (held, again))
    assert mx.array_equal(one, other)
    state = CompressedKVCache.from_state(held.state)
    assert content(state) == content(held) and state.learned is again.learned


@pytest.mark.parametrize("dim", [DIM, 48])
def test_bytes_are_those_of_the_buffers(dim: int) -> None:
    """Without the matrices, which all caches of the model share."""
    for tokens in (20, 512, 1000):
        held = CompressedKVCache("leankv:k3v3,window=32,basis=mine", learned=basis(HEADS, dim))
        plain = CompressedKVCache("leankv:k3v3,window=32,equalize=off")
        for each in (held, plain):
            for start in range(0, tokens, 512):
                shape = (1, HEADS, min(512, tokens - start), dim)
                each.update(mx.random.normal(shape), mx.random.normal(shape))
        found, without = held.memory(), plain.memory()
        assert found.centers == without.centers
        assert found.allocated == without.allocated
        plan = planned(held.config, tokens, HEADS, dim, dim, 4, chunk=512)
        assert (plan.used, plan.allocated) == (found.used, found.allocated)


def test_dropped_tokens_leave_the_others_in_the_basis() -> None:
    """And a policy judges by scores, which do not change."""
    kv = "leankv:k8v8,policy=budget,ratio=40,low=none,window=32"
    kept = []
    for held in (
        CompressedKVCache(f"{kv},equalize=off"),
        CompressedKVCache(f"{kv},basis=mine", learned=stretched()),
    ):
        q, k, v = drawn(0, 400)
        mx.eval(held.update(k, v).attend(q, scale=0.1, mask="causal"))
        held.sequence.end_prompt()
        assert held.layer is not None and held.layer.body is not None and held.layer.ragged
        slots = held.layer.body.describe()
        heads, _ = np.nonzero(slots.tiers >= 0)
        kept.append(set(zip(heads, slots.positions[slots.tiers >= 0], strict=True)))
        with pytest.raises(DroppedTokensError):
            mx.eval(held.keys_and_values()[0] + 0)
    assert 50 < len(kept[0]) < 600
    assert len(kept[0] & kept[1]) > 0.95 * len(kept[0] | kept[1])


def test_a_basis_that_is_not_there_or_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="basis=mine is known by its name alone"):
        CompressedKVCache("leankv:basis=mine")
    held = cache(of=basis(HEADS, 32))
    with pytest.raises(ConfigError, match="basis=mine is for 2 heads of 32 key channels, but this"):
        held.update(*drawn(0, 10)[1:])


@pytest.mark.parametrize("low", [False, True], ids=["as it came", "demoted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_keys_are_where_queries_are_small(backend: str, low: bool) -> None:
    """In the basis they cost less than without what is known of the queries, in codes of a prompt
    and in those that a policy makes of other codes."""
    skewed = stretched()
    alike = Basis(np.array(skewed.matrix), np.ones((HEADS, DIM)))
    policy = ",policy=threshold,alpha_high=1e6,alpha_low=0,low=k2v2" if low else ""
    costs = []
    for of in (skewed, alike):
        held = cache(f"k3v3,backend={backend}{policy}", of)
        _, keys, values = drawn(0, 320)
        held.update(keys, values)
        assert held.layer is not None and held.layer.body is not None
        body = held.layer.body
        if low:
            body.place(np.full_like(body.describe().tiers, LOW))
        (view,) = body.views()
        stored = dequantize(view, body.centers, mx.float32, held.layer.backend).k
        turned = np.array(of.apply(keys[0])[:, 4 : 4 + stored.shape[1]])
        errors = np.array(held.layer.space.rotations[0].undo(stored)) - turned
        costs.append(float((np.array(skewed.costs)[:, None] * errors**2).sum()))
    assert costs[0] < 0.7 * costs[1]
