"""Scores of tokens against a softmax over everything, in NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache, owner_of
from leankv_mlx.cache.judging import judge, judge_window
from leankv_mlx.cache.layer import Layer
from leankv_mlx.sparsity import LargestReceived, Observations

H, G, DIM, SCALE = 2, 3, 32, 0.4
KV = "leankv:window=32,policy=threshold,alpha_high=0,alpha_low=0"


def fed(calls: list[int], kv: str = KV, sink_logits: mx.array | None = None) -> Any:
    """A cache after some calls, and its queries [H * G, N, DIM] in all of them."""
    cache, rng, asked = CompressedKVCache(kv), np.random.default_rng(0), []
    for n in calls:
        q, k, v = (
            mx.array(rng.standard_normal((1, heads, n, DIM)).astype(np.float32))
            for heads in (H * G, H, H)
        )
        fetched = owner_of(*cache.update_and_fetch(k, v))
        assert fetched is not None
        fetched.attend(q, scale=SCALE, mask="causal", sink_logits=sink_logits)
        asked.append(np.array(q[0]))
    return cache, np.concatenate(asked, axis=1)


def keys_in_order(layer: Layer) -> NDArray[Any]:
    """Every key as attention sees it, un-rotated, [H, N, DIM]."""
    return np.array(layer.space.undone(*layer.rows())[0])


def weights(queries: NDArray[Any], keys: NDArray[Any], first: int, logits: Any = None) -> Any:
    """Causal attention weights [H, G, R, N] of queries that stand at `first` and behind it."""
    s = np.einsum("hgrd,hnd->hgrn", queries.reshape(H, G, -1, DIM), keys) * SCALE
    at = first + np.arange(queries.shape[1])[:, None]
    s = np.where(np.arange(keys.shape[1]) <= at, s, -np.inf)
    total = np.exp(s).sum(-1, keepdims=True)
    if logits is not None:
        total = total + np.exp(np.array(logits)).reshape(H, G, 1, 1)
    return np.exp(s) / total


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("equalize", ["", ",equalize=off"])
def test_significance_is_the_mean_weight_from_the_last_64_queries(
    with_logits: bool, equalize: str
) -> None:
    logits = mx.array(np.linspace(-1, 2, H * G).astype(np.float32)) if with_logits else None
    cache, queries = fed([900, 40, 5, 1], KV + equalize, logits)
    layer = cache.layer
    of_stored, of_exact = judge(layer)
    n = cache.offset
    p = weights(queries[:, -64:], keys_in_order(layer), n - 64, logits)
    seen = np.minimum(n - np.arange(n), 64)  # a late token is not seen by all of them
    expected = (p.sum(axis=2) / seen).max(axis=1)
    # sink tokens, stored tokens, window
    ours = np.concatenate([of_exact[:, :4], of_stored, of_exact[:, 4:]], axis=1)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_the_window_is_judged_by_what_later_queries_saw() -> None:
    cache, _ = fed([200, 5])
    assert judge_window(cache.layer) is None  # what the prompt's queries saw is not known
    cache, queries = fed([200] + [1] * 27)  # the second single token ends the prompt
    found = judge_window(cache.layer)
    n, asked = cache.offset, 26
    p = weights(queries[:, -asked:], keys_in_order(cache.layer), n - asked)
    rows = np.r_[0:4, n - (found.shape[1] - 4) : n]
    seen = np.minimum(n - rows, asked)
    np.testing.assert_allclose(found, (p.sum(axis=2)[..., rows] / seen).max(axis=1), atol=2e-6)


def test_the_largest_weight_of_several_calls() -> None:
    cache, _ = fed([900], KV + ",equalize=off")
    layer, collector = cache.layer, LargestReceived()
    view = layer.view()
    slots = slice(4, 4 + view.tiers[0].slots)
    expected = 0
    for seed, n in enumerate((150, 20)):
        q = np.random.default_rng(seed).standard_normal((H * G, n, DIM)).astype(np.float32)
        keys = layer.rows().k
        collector.add(view.rotations[0].apply(mx.array(q)), keys, slots, SCALE, None, None)
        p = weights(q, keys_in_order(layer), cache.offset - n)
        expected = np.maximum(expected, p[..., slots].max(axis=(1, 2)))
    assert collector.scores is not None
    np.testing.assert_allclose(collector.scores, expected, atol=2e-6)


def test_the_ring_holds_the_last_64_queries_and_follows_a_trim() -> None:
    ring = Observations()
    q = mx.arange(200, dtype=mx.float32).reshape(1, 200, 1)
    ring.add(q[:, :150], None, 150, 1.0, None)
    for i in range(150, 190):
        ring.add(q[:, i : i + 1], mx.zeros((1, 1)), i + 1, 1.0, None)

    def held() -> list[int]:
        found = ring.latest(lambda x: x)
        assert found is not None and found.queries[0, :, 0].tolist() == found.positions.tolist()
        return [int(x) for x in found.positions]

    assert held() == list(range(126, 190))
    ring.trim(160)
    assert held() == list(range(96, 160))
    ring.trim(130)
    assert held() == list(range(86, 130))
    ring.trim(10)
    assert ring.latest(lambda x: x) is None and ring.nbytes == 0


def test_queries_keep_their_positions_once_they_are_judged() -> None:
    ring = Observations()
    q = mx.arange(60, dtype=mx.float32).reshape(1, 60, 1)
    ring.add(q[:, :50], None, 50, 1.0, None)
    for i in range(50, 60):  # two layers attend to one cache
        for _ in range(2):
            ring.add(q[:, i : i + 1], mx.zeros((1, 1)), i + 1, 1.0, None)
    before = ring.latest(lambda x: x)
    assert before is not None and before.lse is None
    ring.settle(before.queries[..., 0] * 2)
    after = ring.latest(lambda x: x)
    assert after is not None and after.lse is not None
    np.testing.assert_array_equal(after.queries, before.queries)
    np.testing.assert_array_equal(after.positions, before.positions)
    np.testing.assert_array_equal(after.positions, after.queries[0, :, 0])
    np.testing.assert_array_equal(after.lse[0], 2 * after.positions)
    assert len(after.positions) == 64 and after.positions[-2:].tolist() == [59, 59]


def test_slots_without_a_token_receive_and_take_nothing() -> None:
    rng, collector = np.random.default_rng(0), LargestReceived()
    q = rng.standard_normal((H * G, 5, DIM)).astype(np.float32)
    k = rng.standard_normal((H, 40, DIM)).astype(np.float32)
    present = rng.random((H, 40)) < 0.7
    present[:, 32:] = True
    stored = slice(4, 32)
    arguments = SCALE, None, mx.array(present)
    collector.add(mx.array(q), mx.array(k), stored, *arguments)
    s = np.einsum("hgrd,hnd->hgrn", q.reshape(H, G, 5, DIM), k) * SCALE
    visible = np.arange(40) <= np.arange(35, 40)[:, None]
    p = np.where(visible & present[:, None, None], np.exp(s), 0)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(collector.scores, p[..., stored].max(axis=(1, 2)), atol=1e-6)


def test_the_ring_does_not_keep_the_buffer_of_a_prompt_alive() -> None:
    ring = Observations()
    before = mx.get_active_memory()
    queries = mx.ones((4, 5000, 64))
    mx.eval(queries)
    ring.add(queries, None, 5000, 1.0, None)
    del queries
    assert mx.get_active_memory() - before < 2 * ring.nbytes
    ring.trim(4960)
    kept = ring.latest(lambda x: x)
    assert kept is not None and len(kept.positions) == 24


def test_the_ring_does_not_hold_the_queries_of_the_prompt() -> None:
    ring = Observations()
    ring.add(mx.zeros((4, 5000, 64)), None, 5000, 1.0, None)
    assert ring.nbytes == 4 * 64 * 64 * 4
