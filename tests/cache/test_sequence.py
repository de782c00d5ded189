"""A sequence has its layers, and no others: copies, files, and several sequences of one model.

The kind of fault: layers of two sequences that act on each other, or one that nobody acts for.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from leankv_mlx.cache import CompressedKVCache, Sequence, Sequences, entries, owner_of
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError, DroppedTokensError
from tests.cache.test_placement import BUDGET, DIM, G, H, Stack

LAYERS = 2
CONFIG = CompressionConfig.parse(BUDGET)


class Batch:
    """A toy cache of several sequences of one model: a row of each."""

    def __init__(self, rows: int) -> None:
        self.sequences = [Sequence(CONFIG.policy, CONFIG.scorer) for _ in range(rows)]
        self.caches = [
            [CompressedKVCache(CONFIG, sequence=each) for _ in range(LAYERS)]
            for each in self.sequences
        ]

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Of all rows, [B, Hq, L, D]."""
        out = []
        for row, caches in enumerate(self.caches):
            mine = slice(row, row + 1)
            fetched = owner_of(*caches[layer].update_and_fetch(k[mine], v[mine]))
            assert fetched is not None
            out.append(fetched.attend(q[mine], scale=DIM**-0.5, mask="causal"))
        return mx.concatenate(out)

    def step(self, seed: int, tokens: int, rows: slice = slice(None)) -> mx.array:
        """An update of all layers for some of the rows of a batch of two."""
        rng, out = np.random.default_rng(seed), []
        for layer in range(LAYERS):
            q, k, v = (
                mx.array(rng.standard_normal((2, h, tokens, DIM)).astype(np.float32))[rows]
                for h in (H * G, H, H)
            )
            out.append(self.attend(layer, q, k, v))
            mx.eval(out)
        return mx.stack(out)


def test_two_sequences_of_a_model_go_their_own_way_in_one_batch() -> None:
    both, alone = Batch(2), [Batch(1), Batch(1)]
    steps = [(i, 1) for i in range(40)]
    together = []
    # The first one is told that its prompt goes on, so only the second one drops tokens.
    with both.sequences[0].reading():
        for seed, tokens in [(100, 1500), *steps]:
            together.append(both.step(seed, tokens))
    for row, batch in enumerate(alone):
        told = Sequences.of(batch.caches[0] if row == 0 else ())
        with told.reading():
            for i, (seed, tokens) in enumerate([(100, 1500), *steps]):
                mine = batch.step(seed, tokens, slice(row, row + 1))
                assert mx.array_equal(mine, together[i][:, row : row + 1]), (row, i)
        same = [c.memory() for c in batch.caches[0]]
        assert [c.memory() for c in both.caches[row]] == same
    assert [each.phase.now for each in both.sequences] == ["prompt", "reply"]
    assert [each.offset for each in both.sequences] == [1540, 1540]
    first, second = (each.layers for each in both.sequences)
    assert not any(layer.placed for layer in first) and all(layer.placed for layer in second)


def test_a_copy_of_one_cache_is_a_sequence_of_that_layer_alone() -> None:
    stack = Stack(BUDGET, layers=3)
    stack.feed(2000)
    stack.feed(1)
    whole = stack.slots
    twin = Stack(BUDGET, layers=1)
    twin.caches = [copy.deepcopy(stack.caches[1])]
    assert len(twin.caches[0].sequence.layers) == 1
    assert twin.caches[0].sequence is not stack.caches[1].sequence
    twin.feed(1)  # it leads now, and knows what came before
    assert twin.slots[0] < 0.4 * whole[1] and stack.slots == whole
    twins = copy.deepcopy(stack.caches)
    assert [c.layer for c in twins] == twins[0].sequence.layers
    assert twins[2].sequence is twins[0].sequence


def scores(stack: Stack) -> list[Any]:
    return [cache.layer.body.describe().scores.tolist() for cache in stack.caches]


def goes_on_alike(stack: Stack, twin: Stack, steps: int) -> bool:
    """Whether both hold the same scores after the same steps."""
    twin.rng = copy.deepcopy(stack.rng)
    stack.steps(steps)
    twin.steps(steps)
    return scores(stack) == scores(twin)


def test_a_copy_knows_when_its_scores_were_made() -> None:
    stack, twin = Stack(BUDGET), Stack(BUDGET)
    stack.feed(1500)
    stack.steps(80)
    twin.caches = copy.deepcopy(stack.caches)
    assert goes_on_alike(stack, twin, 40)


def test_a_forgotten_document_is_judged_as_if_it_came_from_a_file(tmp_path: Path) -> None:
    stack, twin = Stack(BUDGET), Stack(BUDGET)
    stack.feed(1500)
    found = Sequences.of(stack.caches)
    found.end_prompt()
    found.forget_queries()
    save(tmp_path / "cache", stack.caches)
    twin.caches = load(tmp_path / "cache").caches
    for each in (stack, twin):
        Sequences.of(each.caches).end_prompt()
    before = scores(stack)
    assert goes_on_alike(stack, twin, 40) and scores(stack) != before


def test_drafts_of_which_nobody_told_are_no_prompt_once_they_are_verified() -> None:
    for verified in (False, True):
        stack = Stack(BUDGET)
        stack.feed(1500)
        stack.feed(12)
        if verified:
            assert Sequences.of(stack.caches).rewind(0) == 0
        stack.feed(12)
        assert all(bool(cache.layer.placed) == verified for cache in stack.caches)


def test_what_keeps_everything_is_left_alone() -> None:
    stack = Stack("leankv")
    stack.feed(100)
    while not stack.caches[0].layer.overfull:
        stack.feed(8)
    before = [cache.memory() for cache in stack.caches]
    found = Sequences.of(stack.caches)
    found.end_prompt()
    found.forget_queries()
    (sequence,) = found
    sequence.place_by([])
    assert [cache.memory() for cache in stack.caches] == before and sequence.is_prefix(1)
    assert sequence.stored == sequence.layers and sequence.offset == stack.caches[0].offset


def test_a_cache_that_takes_another_state_leaves_its_sequence() -> None:
    stack = Stack(BUDGET, layers=2)
    stack.feed(2000)
    first, second = stack.caches
    sequence, state = first.sequence, second.state
    first.state = state
    assert sequence.layers == [second.layer] and first.sequence is not sequence
    assert first.offset == 2000 and first.sequence.layers == [first.layer]
    before = stack.slots
    stack.steps(2)  # the other layer leads now
    assert stack.slots[1] < 0.4 * before[1]


def test_caches_of_a_file_are_one_sequence_and_others_stay_beside_it(tmp_path: Path) -> None:
    stack = Stack(BUDGET, layers=2)
    stack.feed(2000)
    whole = CompressedKVCache("leankv:k3v3")
    other = KVCache()
    for cache in (whole, other):
        cache.update_and_fetch(mx.ones((1, H, 200, DIM)), mx.ones((1, H, 200, DIM)))
    save(tmp_path / "cache", [stack.caches[0], whole, stack.caches[1]])
    first, kept, last = load(tmp_path / "cache").caches
    assert first.sequence is last.sequence is not kept.sequence
    assert first.sequence.layers == [first.layer, last.layer]
    found = Sequences.of([first, CacheList(kept, other), last])
    assert found.ours == (first, kept, last) and found.others == (other,)
    assert found.sequences == (first.sequence, kept.sequence)
    assert list(entries([first, CacheList(kept, other)])) == [first, kept, other]
    for cache in (first, kept, last):  # what was said to all of them
        slots = cache.layer.body.slots
        found.end_prompt()
        assert cache.layer.body.slots <= slots
    assert found.rewind(3) == 3 and kept.offset == other.offset == 197 and first.offset == 1997
    assert kept.layer.body.slots == whole.layer.body.slots  # nothing is dropped of it


def test_a_cache_that_cannot_be_cut_holds_all_of_the_list_back() -> None:
    stack = Stack("leankv")
    stack.feed(100)
    recurrent = ArraysCache(2)
    found = Sequences.of([*stack.caches, CacheList(recurrent)])
    assert not found.can_rewind() and not found.is_prefix(100) and found.rewind(1) == 0
    assert Sequences.of(stack.caches).is_prefix(1) and stack.caches[0].offset == 100
    assert Sequences.of([]).rewind(1) == 0 and Sequences.of([]).is_prefix(0)


def test_everybody_in_a_list_is_told_of_a_prompt() -> None:
    main, draft = Stack(BUDGET), Stack(BUDGET, layers=1)
    with Sequences.of([*main.caches, *draft.caches]).reading(1000):
        for each in (main, draft):
            each.feed(900)
            each.feed(5)
            each.feed(5)
            assert not any(cache.layer.placed for cache in each.caches)
    for each in (main, draft):
        each.feed(5)
        assert all(cache.layer.placed for cache in each.caches)


def test_drafts_that_reach_too_far_are_refused_before_any_cache_is_trimmed() -> None:
    stack, draft = Stack(BUDGET), Stack("leankv")
    for each in (draft, stack):
        each.feed(2000)
        each.steps(4)
    caches: list[Any] = [*draft.caches, *stack.caches]
    with pytest.raises(DroppedTokensError, match="takes back 300 tokens"):
        Sequences.of(caches).rewind(300)
    assert {cache.offset for cache in caches} == {2004}


def test_a_layer_goes_with_its_sequence_and_at_once() -> None:
    stack = Stack(BUDGET)
    stack.feed(200)
    layer = weakref.ref(stack.caches[1].layer)
    gc.disable()
    try:
        del stack
        assert layer() is None
    finally:
        gc.enable()


def test_a_layer_of_another_policy_is_refused() -> None:
    sequence = Sequence(CONFIG.policy, CONFIG.scorer)
    for kv in ("leankv", f"{BUDGET},at=chunk", f"{BUDGET},scores=repeat"):
        with pytest.raises(ConfigError, match="cannot be a layer of a sequence with Budget"):
            CompressedKVCache(kv, sequence=sequence)
        with pytest.raises(ConfigError, match="use the same for both"):
            CompressedKVCache(kv).join(sequence)
    assert sequence.layers == []


def test_a_stale_prefill_of_a_layer_that_left_acts_on_nothing() -> None:
    cache = CompressedKVCache(CONFIG)
    rows = mx.ones((1, H, 100, DIM))
    fetched = owner_of(*(held := cache.update_and_fetch(rows, rows)))
    assert fetched is not None and held is not None
    before = cache.sequence
    cache.join(Sequence(CONFIG.policy, CONFIG.scorer))
    assert before.layers == []
    mx.eval(fetched.attend(mx.ones((1, H * G, 100, DIM)), scale=1.0, mask="causal"))
    assert cache.sequence.layers == [cache.layer]
