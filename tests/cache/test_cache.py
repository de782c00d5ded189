"""The cache by itself: protocol, trim, copies, state, memory; compared with the NumPy oracle."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache, owner_of
from leankv_mlx.errors import ConfigError, ShapeError, UnsupportedError
from tests.oracle import OracleCache

H, G, DK, DV = 2, 3, 64, 32


def rows(n: int, seed: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    """Queries [1, 6, n, 64], keys [1, 2, n, 64] and values [1, 2, n, 32] with a bias."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        mx.array(rng.standard_normal((1, h, n, d)).astype(np.float32) + bias).astype(dtype)
        for h, d, bias in ((H * G, DK, 0.0), (H, DK, 0.5), (H, DV, -0.5))
    )
    return q, k, v


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=DK**-0.5, mask="causal")


class Pair:
    """A cache and its oracle, fed with the same rows."""

    def __init__(self, kv: str = "leankv:window=32") -> None:
        self.ours = CompressedKVCache(kv)
        self.oracle = OracleCache(self.ours)

    def append(self, n: int, seed: int) -> None:
        """Feed n rows and compare the arrays and both ways of attention."""
        q, k, v = rows(n, seed)
        ours, expected = self.ours.update_and_fetch(k, v), self.oracle.update_and_fetch(k, v)
        fetched = owner_of(*ours)
        assert fetched is not None
        fused = fetched.attend(q, scale=DK**-0.5, mask="causal")
        exact = attention(q, *expected)
        assert self.ours.offset == self.oracle.offset
        np.testing.assert_allclose(np.array(fused), np.array(exact), atol=1e-5)
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)

    def trim(self, n: int) -> None:
        n = min(n, self.ours.offset)
        self.oracle.trim(n)
        assert self.ours.trim(n) == n

    def copy(self) -> Pair:
        twin = Pair.__new__(Pair)
        twin.ours = copy.deepcopy(self.ours)
        twin.oracle = copy.copy(self.oracle)
        twin.oracle._rows = [x.copy() for x in self.oracle._rows]
        twin.oracle.real = twin.ours
        return twin


def arrays(cache: CompressedKVCache) -> list[NDArray[Any]]:
    """Everything that a cache holds, decoded."""
    if cache.empty():
        return []
    return [np.array(x) for x in cache.keys_and_values()]


def assert_same(a: list[NDArray[Any]], b: list[NDArray[Any]]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.one_of(st.integers(1, 8), st.integers(9, 150))),
        st.tuples(st.just("trim"), st.integers(1, 120)),
        st.tuples(st.just("fork"), st.just(0)),
        st.tuples(st.just("reload"), st.just(0)),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, sinks=st.sampled_from([0, 4, 40]))
def test_any_sequence_of_operations_equals_the_oracle(
    operations: list[tuple[str, int]], sinks: int
) -> None:
    pair = Pair(f"leankv:window=32,sink_tokens={sinks}")
    left_behind: list[tuple[CompressedKVCache, list[NDArray[Any]]]] = []
    pair.append(70, seed=99)
    for seed, (name, n) in enumerate(operations):
        if name == "append":
            pair.append(n, seed)
        elif name == "trim":
            pair.trim(n)
        elif name == "fork":
            left_behind.append((pair.ours, arrays(pair.ours)))
            pair = pair.copy()
        else:
            pair.ours = pair.oracle.real = CompressedKVCache.from_state(pair.ours.state)
    for cache, before in left_behind:
        assert_same(arrays(cache), before)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 100, 128, 190, 196, 197, 200, 500])
def test_trim_at_any_depth(n: int) -> None:
    pair = Pair()
    pair.append(200, seed=0)
    pair.trim(n)
    assert pair.ours.size() == max(0, 200 - n)
    for step in range(40):  # through the next flush
        pair.append(1, seed=1 + step)
    pair.append(100, seed=77)


@pytest.mark.parametrize("beyond", [0, 1, 2])
def test_trim_where_the_window_ends(beyond: int) -> None:
    pair = Pair()
    pair.append(200, seed=0)
    pair.trim(pair.ours.layer.recent + beyond)
    pair.append(50, seed=1)


def test_speculative_steps_equal_the_oracle() -> None:
    pair = Pair()
    pair.append(150, seed=0)
    for step in range(60):
        pair.append(1 + step % 5, seed=1 + step)
        pair.trim(step % 4)


def test_the_body_holds_what_leaves_the_window() -> None:
    cache = CompressedKVCache("leankv:k4v4,window=64,sink_tokens=4")
    sizes = []
    for n, seed in [(100, 0), (1, 1), *((8, s) for s in range(2, 12)), (300, 12)]:
        _, k, v = rows(n, seed)
        cache.update_and_fetch(k, v)
        sizes.append((cache.view().exact.k.shape[1], sum(b.slots for b in cache.view().tiers)))
    assert sizes[0] == (68, 32)
    assert all(exact + body == sum([100, 1, *[8] * 10, 300][: i + 1])
               for i, (exact, body) in enumerate(sizes))  # fmt: skip
    assert max(exact for exact, _ in sizes) <= 4 + 95 + 8
    assert 4 + 64 <= sizes[-1][0] < 4 + 96


def test_deep_copies_cost_no_pool_memory_and_are_independent() -> None:
    pair = Pair()
    pair.append(300, seed=0)
    allocated = pair.ours.memory().allocated
    twin = pair.copy()
    pool = pair.ours.layer.body.tables[0].pool  # type: ignore[union-attr]
    used = pool.used
    assert (
        twin.ours.memory() == pair.ours.memory() and pool.capacity * pool.block_nbytes < allocated
    )
    before = arrays(pair.ours)
    assert_same(arrays(twin.ours), before)
    twin.append(40, seed=5)
    assert pool.used > used
    assert_same(arrays(pair.ours), before)
    pair.trim(150)
    pair.append(90, seed=6)
    twin.append(3, seed=7)
    del pair
    twin.trim(200)
    assert pool.used == twin.ours.layer.body.tables[0].blocks  # type: ignore[union-attr]


def test_a_reloaded_state_gives_bit_identical_attention() -> None:
    cache = CompressedKVCache("leankv:k3v8,sink_tokens=2,rounding=rms")
    _, k, v = rows(250, 0, mx.bfloat16)
    cache.update_and_fetch(k, v)
    again = CompressedKVCache.from_state(cache.state)
    assert again.config == cache.config and again.memory() == cache.memory()
    q, k, v = rows(4, 1, mx.bfloat16)
    outs = []
    for c in (cache, again):
        keys, values = c.update_and_fetch(k, v)
        fetched = owner_of(keys, values)
        assert fetched is not None
        outs.append(fetched.attend(q, scale=0.125, mask="causal"))
    assert mx.array_equal(*outs)


def test_an_empty_cache() -> None:
    cache = CompressedKVCache()
    assert cache.empty() and cache.size() == cache.offset == cache.nbytes == cache.fp16_nbytes == 0
    assert cache.trim(5) == 0 and cache.is_trimmable()
    assert CompressedKVCache.from_state(cache.state).empty()
    assert copy.deepcopy(cache).empty()
    with pytest.raises(UnsupportedError, match="empty"):
        cache.keys_and_values()
    mx.eval([cache.state])


def test_keys_and_values_are_the_tracked_arrays_until_the_next_update() -> None:
    cache = CompressedKVCache(keep_fetched=True)
    _, k, v = rows(200, 0)
    keys, values = cache.update_and_fetch(k, v)
    again = cache.keys_and_values()
    assert again[0] is keys and again[1] is values
    del keys, values, again
    # What is kept is what was attended to: the rows before they were compressed.
    np.testing.assert_allclose(np.array(cache.keys_and_values()[0]), np.array(k), atol=1e-5)
    assert owner_of(k, v) is None


def test_a_stale_fetch_still_attends_to_what_it_was() -> None:
    cache = CompressedKVCache()
    q, k, v = rows(150, 0)
    old = cache.update_and_fetch(k, v)
    expected = attention(q, k, v)
    for step in range(70):
        cache.update_and_fetch(*rows(1, step)[1:])
    fetched = owner_of(*old)
    assert fetched is not None
    out = fetched.attend(q, scale=DK**-0.5, mask="causal")
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("additive", [False, True])
def test_array_masks(n: int, additive: bool) -> None:
    cache = CompressedKVCache("leankv:window=32")
    cache.update_and_fetch(*rows(200, 0)[1:])
    mask = cache.make_mask(n, return_array=True, window_size=90)
    assert isinstance(mask, mx.array) and mask.shape == (n, 200 + n)
    q, k, v = rows(n, 1)
    fetched = cache.update_and_fetch(k, v)
    owner = owner_of(*fetched)
    assert owner is not None
    if additive:
        mask = mx.where(mask, 0.0, -mx.inf)
    ours = owner.attend(q, scale=0.125, mask=mask)
    exact = mx.fast.scaled_dot_product_attention(q, *fetched, scale=0.125, mask=mask)
    np.testing.assert_allclose(np.array(ours), np.array(exact), atol=1e-5)


def test_masks_are_those_of_mlx_lm() -> None:
    from mlx_lm.models.cache import KVCache

    ours, theirs = CompressedKVCache(), KVCache()
    for cache in (ours, theirs):
        cache.update_and_fetch(*rows(20, 0)[1:])
    for kwargs in ({}, {"return_array": True}, {"window_size": 7},
                   {"window_size": 7, "return_array": True}):  # fmt: skip
        for n in (1, 6):
            a = ours.make_mask(n, **kwargs)  # type: ignore[arg-type]
            b = theirs.make_mask(n, **{"window_size": None, "return_array": False, **kwargs})
            if isinstance(b, mx.array):
                assert isinstance(a, mx.array) and mx.array_equal(a, b)
            else:
                assert a == b


def test_wrong_arrays_are_refused_and_nothing_is_lost() -> None:
    pair = Pair()
    pair.append(120, seed=0)
    before = arrays(pair.ours)
    zeros = mx.zeros
    for error, k, v in [
        (ShapeError, zeros((2, 5, 64)), zeros((2, 5, 32))),
        (ShapeError, zeros((1, 2, 5, 64)), zeros((1, 2, 6, 32))),
        (ShapeError, zeros((1, 2, 0, 64)), zeros((1, 2, 0, 32))),
        (ShapeError, zeros((1, 3, 5, 64)), zeros((1, 3, 5, 32))),
        (ShapeError, zeros((1, 2, 5, 32)), zeros((1, 2, 5, 32))),
        (UnsupportedError, zeros((2, 2, 5, 64)), zeros((2, 2, 5, 32))),
    ]:
        with pytest.raises(error):
            pair.ours.update_and_fetch(k, v)
    assert_same(arrays(pair.ours), before)
    pair.append(3, seed=1)


def test_bits_per_group_must_fit_the_head_dim() -> None:
    cache = CompressedKVCache("leankv:k_bits=4.4.2,v_bits=4")
    with pytest.raises(ConfigError, match="head_dim 64 has 2"):
        cache.update_and_fetch(*rows(5, 0)[1:])


def test_heads_wider_than_a_backend_takes() -> None:
    rng = np.random.default_rng(0)
    outs = []
    q, k, v = (
        mx.array(rng.standard_normal((1, h, 171, 512)).astype(np.float32)) for h in (2, 1, 1)
    )
    for backend in ("auto", "reference"):
        cache = CompressedKVCache(f"leankv:window=32,backend={backend}")
        for part in (slice(0, 170), slice(170, 171)):
            fetched = owner_of(*cache.update_and_fetch(k[:, :, part], v[:, :, part]))
            assert fetched is not None
            out = fetched.attend(q[:, :, part], scale=512**-0.5, mask="causal")
            mx.eval(out)
        outs.append(np.array(out))
    np.testing.assert_allclose(*outs, atol=1e-5)


def test_groups_without_bits_fall_back_to_their_center() -> None:
    cache = CompressedKVCache("leankv:k_bits=8.0,v_bits=8,window=32,sink_tokens=0")
    _, k, v = rows(200, 0)
    cache.update_and_fetch(k, v)
    keys, _ = cache.keys_and_values()
    body = slice(0, 160)
    error = mx.square(keys - k)[:, :, body].mean()
    assert 0.3 < float(error) < 0.7  # half of the channels' variance is gone
    assert abs(float((keys - k)[:, :, body].mean())) < 0.02


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_memory_is_what_the_buffers_hold(dtype: mx.Dtype) -> None:
    cache = CompressedKVCache("leankv:k4v2,window=64,sink_tokens=4")
    _, k, v = rows(1000, 0, dtype)
    cache.update_and_fetch(k, v)
    memory, view = cache.memory(), cache.view()
    (body,) = view.tiers
    slots = H * body.slots
    assert memory.codes == slots * (DK * 4 + DV * 2) // 8
    assert memory.scales == slots * 4
    assert memory.tables == body.table.nbytes + body.lengths.nbytes
    assert memory.exact == view.exact.k.nbytes + view.exact.v.nbytes
    assert memory.used == cache.nbytes
    assert memory.allocated == memory.used + body.pool.nbytes - memory.codes - memory.scales
    assert cache.fp16_nbytes == 1000 * H * (DK + DV) * 2
    step = 32 * body.pool.shape[1] * 4
    assert memory.allocated <= 1.15 * memory.used + step


def test_prefill_leaves_no_buffer_of_the_chunk_behind() -> None:
    cache = CompressedKVCache()
    _, k, v = rows(4096, 0)
    mx.eval(k, v)
    mx.clear_cache()
    before = mx.get_active_memory()
    cache.update_and_fetch(k, v)
    mx.eval([cache.state])
    assert mx.get_active_memory() - before < 1.05 * cache.memory().allocated + 4096


@pytest.mark.parametrize("queries", [1, 12])
def test_a_fetch_stays_what_it_was_made_of(queries: int) -> None:
    """Some models attend to what an earlier layer fetched, when other tokens have come since."""
    cache = CompressedKVCache("leankv")
    _, k, v = rows(300, 1)
    cache.update_and_fetch(k, v)
    mx.eval(cache.state)
    keys, values = cache.keys_and_values()
    fetch = owner_of(keys, values)
    assert fetch is not None
    q = mx.random.normal((1, H * G, queries, DK), key=mx.random.key(2))
    before = fetch.attend(q, scale=0.1, mask=None)
    mx.eval(before)
    for seed in (3, 4):
        _, k, v = rows(100, seed)
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)
    assert mx.array_equal(fetch.attend(q, scale=0.1, mask=None), before)
