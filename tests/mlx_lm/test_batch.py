"""mlx-lm's own batches with our caches in place: every prompt gets what it gets alone.

The kinds of fault: rows that see each other's tokens or padding, a row whose prompt ends where
nobody looks, and layers that are not told what the others are. Tokens are compared, and logprobs:
they differ by rounding alone, because products of a batch are summed in another order, and by a
code of the cache that this moves over the border to the next.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import KVCache, LRUPromptCache

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache, Sequences
from leankv_mlx.mlx_lm import attach
from leankv_mlx.mlx_lm.usage import measure
from tests.mlx_lm.batches import LOOPS, Batch, Reply, alone, prompts, same
from tests.models import TINY, _randomize

KV = "leankv:window=32"
LEAN = "leankv:policy=budget,ratio=8,window=32"
POLICIES = [
    LEAN,
    f"{LEAN},at=chunk",
    f"{LEAN},low=k3v2",
    "leankv:policy=threshold,window=32,alpha_high=8,alpha_low=2",
    "leankv:policy=streaming,window=32",
    "leankv:policy=budget,budget=600K,window=32",
]
SETTINGS = [
    "leankv",
    "leankv:window=96,sink_tokens=40",
    *(
        f"{KV},{setting}"
        for setting in (
            "equalize=on",
            "skip=0.001",
            "sink_tokens=0",
            "k2v2",
            "rotation=none",
            "backend=reference",
        )
    ),
]
NO_BATCHES = {"gemma2": "its own masks are of one sequence: mlx-lm's caches fail likewise"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"]()


def check(
    model: nn.Module,
    lengths: list[int],
    tokens: list[int],
    step: int = 64,
    late: int = 2,
    **options: Any,
) -> list[Reply]:
    """Assert that prompts of these lengths, the last ones `late`, get what they get alone."""
    given = prompts(*lengths)
    batch = Batch(model, step, **options)
    uids = batch.insert(given[: len(given) - late], tokens[: len(given) - late])
    for prompt, n in zip(given[len(uids) :], tokens[len(uids) :], strict=True):
        batch.step(), batch.step()
        uids += batch.insert([prompt], [n])
    batch.run()
    for uid, prompt, n in zip(uids, given, tokens, strict=True):
        assert len(batch.replies[uid].tokens) == n
        assert same(batch.replies[uid], alone(model, prompt, n, step=step)), len(prompt)
    return [batch.replies[uid] for uid in uids]


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_model(name: str) -> None:
    if name in NO_BATCHES:
        pytest.skip(NO_BATCHES[name])
    model = TINY[name]()
    with attach(model, KV):
        replies = check(
            model, [1, 150, 7, 40, 2, 97], [40, 38, 40, 12, 40, 40],
            prefill_batch_size=4, completion_batch_size=5,
        )  # fmt: skip
        for reply in replies:
            assert reply.cache is not None
            kinds = [isinstance(cache, CompressedKVCache) for cache in reply.cache]
            assert kinds == [i in TINY[name].compressed for i in range(len(kinds))]
            ours = Sequences.of(reply.cache)
            assert len(ours.sequences) == bool(ours.ours)
            assert [c.layer for c in ours.ours] == [x for s in ours.sequences for x in s.layers]


def test_layers_that_take_keys_and_values_from_another_layers_cache() -> None:
    from mlx_lm.models import afm7

    mx.random.seed(0)
    args = {
        "model_type": "afm7", "vocab_size": 128, "hidden_dim": 96, "num_layers": 4, "num_heads": 3,
        "num_kv_heads": 3, "num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 2.0,
        "rope_theta": 1e4,
    }  # fmt: skip
    fields = afm7.ModelArgs.__dataclass_fields__
    model = afm7.Model(afm7.ModelArgs(**{k: v for k, v in args.items() if k in fields}))
    _randomize(model, 0)
    mx.eval(model.parameters())
    with attach(model, KV):
        # It takes positions from the width of the arrays, so other lengths are wrong anyway.
        check(model, [150] * 3, [40, 38, 12], late=0)


@pytest.mark.parametrize("kv", SETTINGS)
def test_every_setting(kv: str, model: nn.Module) -> None:
    with attach(model, kv):
        check(model, [170, 3, 97, 30], [40, 40, 20, 40])


@pytest.mark.parametrize("kv", POLICIES)
def test_every_policy_drops_what_it_drops_alone(kv: str, model: nn.Module) -> None:
    with attach(model, kv):
        replies = check(model, [900, 3, 640, 1, 130], [45, 45, 20, 45, 45], step=512)
        dropped = [not Sequences.of(reply.cache).is_prefix(1) for reply in replies]
        assert dropped[0] and not dropped[1]


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_ragged_batches_of_up_to_16(rows: int, model: nn.Module) -> None:
    rng = np.random.default_rng(rows)
    lengths = rng.integers(1, 200, rows).tolist()
    tokens = rng.integers(1, 50, rows).tolist()
    with attach(model, KV):
        check(model, lengths, tokens, late=rows // 2, prefill_batch_size=5)


@pytest.mark.parametrize("step", [1, 5, 8, 9, 33])
def test_prompts_read_in_small_chunks(step: int, model: nn.Module) -> None:
    for kv in (KV, f"{LEAN},window=32"):
        with attach(model, kv):
            check(model, [90, 1, 17, 40, 8], [34] * 5, step=step)


@pytest.mark.slow
def test_prompts_of_8k(model: nn.Module) -> None:
    for kv in ("leankv", "leankv:policy=budget,ratio=8"):
        with attach(model, kv):
            check(model, [8192, 1, 8000, 700], [40] * 4, step=2048)


def test_every_prompt_of_one_token(model: nn.Module) -> None:
    for kv in (KV, LEAN):
        with attach(model, kv):
            check(model, [1, 1, 1], [70, 70, 70], late=1)


@pytest.mark.parametrize(
    "size", [1, 8, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 50))]
)
def test_segments_of_any_size(size: int, model: nn.Module) -> None:
    given = prompts(70, 9, 130)
    for kv in (KV, LEAN):
        with attach(model, kv):
            batch = Batch(model, 64)
            segments = [[p[i : i + size] for i in range(0, len(p), size)] for p in given]
            uids = batch.generator.insert_segments(copy.deepcopy(segments), [40] * 3)
            batch.replies = {uid: Reply() for uid in uids}
            batch.run()
            for uid, parts in zip(uids, segments, strict=True):
                cache = model.make_cache()
                with Sequences.of(cache).reading():  # the same cuts, one prompt at a time
                    for part in parts[:-1]:
                        for i in range(0, len(part), 64):
                            model(mx.array([part[i : i + 64]]), cache=cache)
                expected = alone(model, parts[-1], 40, cache, step=64)
                assert same(batch.replies[uid], expected)


def test_rows_leave_at_any_stage(model: nn.Module) -> None:
    given = prompts(300, 20, 150, 90, 41)
    with attach(model, KV):
        expected = [alone(model, prompt, 20, step=64) for prompt in given]
        for steps in (0, 2, 5, 8):
            batch = Batch(model, 64, prefill_batch_size=3)
            uids = batch.insert(given, [20] * 5)
            for _ in range(steps):
                batch.step()
            gone = [uids[0], uids[3]]
            left = batch.generator.remove(gone, return_prompt_caches=True)
            assert set(left) == set(gone)
            batch.run()
            for uid, prompt, reply in zip(uids, given, expected, strict=True):
                if uid not in gone:
                    assert same(batch.replies[uid], reply)
                    continue
                # What left goes on where it was.
                cache, tokens = left[uid]
                if len(tokens) < len(prompt):
                    rest = alone(model, prompt[len(tokens) :], 20, cache, step=64)
                    assert prompt[: len(tokens)] == tokens and same(rest, reply)


def test_replies_go_on_from_the_caches_that_a_batch_gives(model: nn.Module) -> None:
    first, second = prompts(5, 3, 100, 1), prompts(2, 7, 40, 66, seed=1)
    for kv in (KV, LEAN, "leankv:policy=streaming,window=32"):
        with attach(model, kv):
            batch = Batch(model, 64, prefill_batch_size=4, completion_batch_size=4)
            uids = batch.insert(first, [70] * 4)
            batch.run()
            caches = [batch.replies[uid].cache for uid in uids]
            held = [measure(cache).used for cache in caches]
            again = batch.insert(second, [20] * 4, caches=caches)
            batch.run()
            assert [measure(cache).used for cache in caches] == held  # a batch works on copies
            for uid, prompt, cache in zip(again, second, caches, strict=True):
                assert same(batch.replies[uid], alone(model, prompt, 20, cache, step=64))


def test_filled_and_empty_caches_join_one_batch(model: nn.Module) -> None:
    given = prompts(200, 50, 1, 70)
    for kv in (KV, LEAN):
        with attach(model, kv):
            caches = [alone(model, prompt, 12).cache if prompt else None for prompt in given[:2]]
            expected = [
                alone(model, p, 25, copy.deepcopy(c))
                for p, c in zip(given[2:] + given[:2], [*caches, None, None], strict=True)
            ]
            batch = Batch(model)
            uids = batch.insert(given[2:], [25] * 2, caches=caches)
            uids += batch.insert(given[:2], [25] * 2)
            batch.run()
            for uid, reply in zip(uids, expected, strict=True):
                assert same(batch.replies[uid], reply)


class Store:
    """What `mlx_lm.server` does with its store of prompts for requests of a batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.store, self.reused = model, LRUPromptCache(10), 0

    def ask(self, requests: list[list[int]], tokens: int = 6) -> list[Reply]:
        batch, uids = Batch(self.model, 512), []
        for prompt in requests:
            cache, rest = self.store.fetch_nearest_cache("key", prompt[:])
            self.reused += len(prompt) - len(rest)
            caches = [cache or self.model.make_cache()]
            done = [prompt[: len(prompt) - len(rest)]]
            uids += batch.insert([rest], [tokens], caches=caches, all_tokens=done)
        batch.run()
        for uid, prompt in zip(uids, requests, strict=True):
            reply = batch.replies[uid]
            self.store.insert_cache("key", prompt + reply.tokens, reply.cache)
        return [batch.replies[uid] for uid in uids]


@pytest.mark.parametrize("kv", POLICIES[::2])
def test_no_request_answers_from_what_another_one_kept(kv: str, model: nn.Module) -> None:
    (document,), questions = prompts(900), prompts(30, 25, 5, 12, seed=1)
    with attach(model, kv):
        store = Store(model)
        for pair in (questions[:2], questions[2:]):
            requests = [document + question for question in pair]
            for reply, prompt in zip(store.ask(requests), requests, strict=True):
                assert same(reply, alone(model, prompt, 6, step=512))
        assert store.reused == 0
        (reply,) = store.ask([requests[0] + [1, 2, 3]])
        following = [*requests[0], 1, 2, 3, *reply.tokens, 7, 8]
        store.ask([following])
        assert store.reused == len(following) - 2  # the next turn is served from it


def test_a_batch_that_was_copied_goes_on_as_two(model: nn.Module) -> None:
    given = prompts(150, 3, 70)
    for kv in (KV, LEAN):
        with attach(model, kv):
            one = LOOPS["PromptProcessingBatch"](
                model, [0, 1, 2], [model.make_cache() for _ in given], samplers=[None] * 3,
                logits_processors=[()] * 3,
            )  # fmt: skip
            one.prompt([prompt[:-1] for prompt in given])
            two = one.split([2])
            assert [len(x) for x in (one, two)] == [2, 1]
            for batch, rows in ((two, given[2:]), (one, given[:2])):
                last = batch.generate([prompt[-1:] for prompt in rows])
                out = [[r.token for r in last.next()] for _ in range(20)]
                for i, prompt in enumerate(rows):
                    assert [step[i] for step in out] == alone(model, prompt, 20).tokens


def test_a_batch_of_one_is_the_sequence_alone(model: nn.Module) -> None:
    (prompt,) = prompts(400)
    for kv in (KV, LEAN):
        with attach(model, kv):
            batch = Batch(model, 128)
            (uid,) = batch.insert([prompt], [80])
            batch.run()
            expected = alone(model, prompt, 80, step=128)
            assert batch.replies[uid].tokens == expected.tokens
            assert measure(batch.replies[uid].cache) == measure(expected.cache)


@pytest.fixture
def generating(model: nn.Module) -> Iterator[Batch]:
    with attach(model, KV):
        batch = Batch(model)
        batch.insert(prompts(200, 30, 1), [300] * 3)
        for _ in range(50):
            batch.step()
        yield batch


def test_bytes_of_a_batch_are_counted(generating: Batch) -> None:
    caches = generating.generator._generation_batch.prompt_cache
    assert all(type(cache) is BatchedKVCache for cache in caches)
    usage = measure(caches)
    offsets = caches[0].offsets
    assert usage.tokens == max(offsets) > 240 and 0 < min(offsets) < 60
    assert usage.used == sum(cache.nbytes for cache in caches)  # nothing is shared
    assert usage.fp16 == sum(offsets) * len(caches) * 2 * 2 * (64 + 64)
    assert usage.used < usage.allocated


def test_bytes_of_mlx_lms_own_batches_are_counted() -> None:
    caches = [KVCache(), KVCache()]
    for cache, n in zip(caches, (10, 30), strict=True):
        cache.update_and_fetch(*[mx.zeros((1, 2, n, 64), mx.float16)] * 2)
    batch = KVCache.merge(caches)
    usage = measure([batch])
    assert (usage.tokens, usage.fp16) == (30, 40 * 2 * 2 * 64 * 2)
    assert usage.used == usage.fp16 and usage.allocated == batch.nbytes


def test_threads_hand_a_batch_on(model: nn.Module) -> None:
    given = prompts(120, 9)
    with attach(model, KV):
        expected = [alone(model, prompt, 40).tokens for prompt in given]
        caches = [model.make_cache() for _ in given]
        for prompt, cache in zip(given, caches, strict=True):
            model(mx.array([prompt[:-1]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        found: list[list[int]] = []

        def work() -> None:
            try:
                batch = Batch(model, stream=mx.new_stream(mx.default_device()))
                uids = batch.insert([p[-1:] for p in given], [40] * 2, caches=caches)
                batch.run()
                found.extend(batch.replies[uid].tokens for uid in uids)
            finally:
                mx.clear_streams()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        assert found == expected
