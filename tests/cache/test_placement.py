"""Policies at work: when tokens are dropped, from all layers at once, and what that frees."""

from __future__ import annotations

import copy
import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx import attach
from leankv_mlx.cache import CompressedKVCache, Sequence, Sequences, owner_of, placement
from leankv_mlx.cache.judging import judge, judge_window
from leankv_mlx.cache.layer import Layer
from leankv_mlx.codec.channels import Channels
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError, UnsupportedError
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.repetition import settle_document
from leankv_mlx.policies.budget import LEAST_SLOTS
from leankv_mlx.scorers.pooling import pooled
from tests.models import TINY

H, G, DIM = 2, 2, 64
KEPT = (1, 2), (1, 0)  # groups of channels of each head, layer by layer
ORDER = tuple(range(DIM)), tuple(reversed(range(DIM)))
BUDGET = "leankv:policy=budget,ratio=8,window=32"


class Stack:
    """The caches of a model of some layers, fed with random rows."""

    def __init__(self, kv: str, layers: int = 2) -> None:
        config = CompressionConfig.parse(kv)
        sequence = Sequence(config.policy, config.scorer)
        masks = [Channels(ORDER, groups) if config.mask else None for groups in KEPT]
        self.caches = [
            CompressedKVCache(config, sequence=sequence, learned=masks[i % 2])
            for i in range(layers)
        ]
        self.rng = np.random.default_rng(0)

    def feed(self, n: int, attend: bool = True) -> None:
        for cache in self.caches:
            asked = min(n, 64)  # the last of them are enough
            q, k, v = (
                mx.array(self.rng.standard_normal((1, heads, length, DIM)).astype(np.float16))
                for heads, length in ((H * G, asked), (H, n), (H, n))
            )
            fetched = owner_of(*cache.update_and_fetch(k, v))
            assert fetched is not None
            if attend:
                mx.eval(fetched.attend(q, scale=DIM**-0.5, mask="causal"))

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.feed(1)

    @property
    def slots(self) -> list[int]:
        return [cache.layer.body.slots if cache.layer.body else 0 for cache in self.caches]

    @property
    def used(self) -> int:
        return sum(cache.memory().used for cache in self.caches)

    @property
    def allocated(self) -> int:
        return sum(cache.memory().allocated for cache in self.caches)


def test_the_second_single_token_ends_the_prompt() -> None:
    stack = Stack(BUDGET)
    stack.feed(1500)
    stack.feed(500)
    whole = stack.slots
    assert whole[0] > 2 * 1900
    stack.feed(1)  # the last token of the prompt
    assert stack.slots == whole
    stack.feed(1)
    assert all(slots < 0.4 * before for slots, before in zip(stack.slots, whole, strict=True))


def test_a_verification_in_drafts_ends_the_prompt_too() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    whole = stack.slots
    for _ in range(2):
        stack.feed(1)
        stack.feed(4)
        stack.caches[0].trim(2), stack.caches[1].trim(2)
    assert stack.slots == whole  # calls of other sizes say nothing
    stack.feed(4)
    assert stack.slots[0] < whole[0]


def test_a_document_does_not_tell_where_the_question_ends() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    stack.feed(1)  # the last chunk of the document
    Sequences.of(stack.caches).forget_queries()
    whole = stack.slots
    stack.feed(1)
    assert stack.slots == whole
    stack.feed(1)
    assert all(slots < 0.4 * before for slots, before in zip(stack.slots, whole, strict=True))


def test_a_trim_of_ragged_heads_takes_what_stands_behind_it() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    stack.steps(2)
    for cache in stack.caches:
        before = cache.layer.body.describe().positions
        cut = int(np.sort(before[before >= 0])[-40])
        cache.trim(cache.offset - cut)
        after = cache.layer.body.describe().positions
        kept = [sorted(head[(head >= 0) & (head < cut)]) for head in before]
        assert [sorted(head[head >= 0]) for head in after] == kept


@pytest.mark.parametrize(("mask", "ratios"), [("", (6, 12)), (",mask=some", (12, 24))])
def test_bytes_fall_as_the_policy_says(mask: str, ratios: tuple[int, ...]) -> None:
    for ratio in ratios:
        stack = Stack(f"leankv:policy=budget,ratio={ratio},window=32{mask}", layers=3)
        stack.feed(8000)
        Sequences.of(stack.caches).end_prompt()
        fp16 = sum(cache.fp16_nbytes for cache in stack.caches)
        assert 0.93 * fp16 / ratio < stack.used <= fp16 / ratio
        assert stack.allocated <= 1.15 * stack.used


def test_half_the_slots_take_half_the_memory() -> None:
    stack = Stack("leankv:policy=threshold,low=none,window=32")
    stack.feed(8000, attend=False)
    before = stack.allocated, stack.used
    for cache in stack.caches:
        body = cache.layer.body
        plan = body.describe().tiers.copy()
        plan[stack.rng.random(plan.shape) < 0.5] = -1
        body.place(plan)
    assert 0.45 < stack.used / before[1] < 0.55
    assert 0.45 < stack.allocated / before[0] < 0.55
    pools = sum(t.pool.array.nbytes for c in stack.caches for t in c.layer.body.tables)
    assert stack.allocated > pools > 0.8 * stack.allocated  # counted from the arrays themselves


@pytest.mark.parametrize("policy", ["streaming", "threshold,alpha_high=900,alpha_low=0"])
def test_nothing_keeps_the_blocks_of_a_tier_that_has_none_left(policy: str) -> None:
    gc.collect()
    before = mx.get_active_memory()
    stack = Stack(f"leankv:policy={policy},window=32")
    stack.feed(4000)
    stack.steps(2)  # no state is evaluated, as while a model generates
    gc.collect()
    held = stack.allocated - sum(t.nbytes for c in stack.caches for t in c.layer.body._tiers)
    # With it this was many times as much; what else MLX holds is not ours to say.
    assert mx.get_active_memory() - before < 1.1 * held + 50_000


def test_generation_under_a_byte_budget_stays_flat() -> None:
    nbytes = 600_000
    stack = Stack(f"leankv:policy=budget,ratio=1.01,budget={nbytes},window=32")
    stack.feed(1500)
    seen = []
    for step in range(2000):
        stack.feed(1)
        if step > 2:
            seen.append(stack.allocated)
    assert max(seen) <= nbytes
    assert min(seen[500:]) > 0.8 * nbytes  # and it is made use of


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [(1700, ""), (3000, ",low=k3v2,scope=model"), (3000, ",low=k3v2"), (200, ",low=k3v2")],
)
def test_no_step_takes_more_than_the_byte_budget(prompt: int, settings: str) -> None:
    nbytes = 600_000
    stack = Stack(f"leankv:policy=budget,ratio=1.01,budget={nbytes},window=32{settings}")
    stack.feed(prompt)
    for step in range(150):
        stack.feed(1)
        assert step < 2 or stack.allocated <= nbytes


def test_a_head_much_longer_than_the_others_keeps_to_the_budget_too() -> None:
    heads, nbytes = 8, 600_000
    cache = CompressedKVCache(f"leankv:policy=budget,ratio=1.01,budget={nbytes},window=32")
    k, v, q = (
        np.random.default_rng(i).standard_normal((1, heads, 4000, DIM)).astype(np.float16)
        for i in range(3)
    )
    q[:, 1:], k[:, 1:] = 4, -1
    k[:, 1:, -64:] = 1  # all heads but the first one look at the window alone
    for start, stop in ((0, 3960), *((i, i + 1) for i in range(3960, 4000))):
        rows = (mx.array(x[:, :, start:stop]) for x in (k, v))
        fetched = owner_of(*cache.update_and_fetch(*rows))
        assert fetched is not None
        asked = mx.array(q[:, :, max(start, stop - 64) : stop])
        mx.eval(fetched.attend(asked, scale=1.0, mask="causal"))
        lengths = cache.layer.body.tables[0].lengths
        assert stop < 3962 or cache.memory().allocated <= nbytes
    assert lengths[0] > 2 * lengths[1:].max()


def test_tokens_that_leave_the_window_are_scored_by_what_later_queries_saw() -> None:
    stack = Stack("leankv:policy=threshold,alpha_high=0,alpha_low=0,window=32,pooling=3")
    stack.feed(500)
    stack.steps(2)
    layer = stack.caches[1].layer
    while layer.leaving[0] == layer.leaving[1]:
        stack.steps(1)
    start, stop = layer.leaving
    at = layer.exact_positions
    judged = np.array(judge_window(layer))
    expected = pooled(judged, np.broadcast_to(at, judged.shape), 3)[:, start:stop]
    stack.steps(1)
    slots = layer.body.describe()
    for head, positions in enumerate(slots.positions):
        found = dict(zip(positions.tolist(), slots.scores[head].tolist(), strict=True))
        ours = [found[int(position)] for position in at[start:stop]]
        np.testing.assert_allclose(ours, expected[head], rtol=0.05)
    assert expected.min() < 0.9 * expected.max()


def judged(layer: Layer, width: int) -> Any:
    """What the stored scores should be if they were made now, [H, S]."""
    stored, exact = (np.array(x) for x in judge(layer))
    positions = layer.body.describe().positions
    around = np.broadcast_to(layer.exact_positions, exact.shape)
    both = np.concatenate([stored, exact], 1), np.concatenate([positions, around], 1)
    return pooled(*both, width)[:, : positions.shape[1]]


def test_the_end_of_the_prompt_scores_every_stored_token() -> None:
    stack = Stack("leankv:policy=threshold,alpha_high=0,alpha_low=0,window=32,pooling=3")
    stack.feed(515)
    stack.feed(1)  # a block is about to leave the window
    layer = stack.caches[1].layer
    assert layer.leaving[1] > layer.leaving[0]
    twin = layer.copy()
    twin.compress()
    expected = judged(twin, 3)
    Sequences.of(stack.caches).end_prompt()
    assert layer.leaving[1] == layer.leaving[0] and not layer.observed
    np.testing.assert_allclose(layer.body.describe().scores, expected, rtol=0.05)


def test_stored_scores_are_made_anew_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "REFRESH_TOKENS", 96)
    stack = Stack("leankv:policy=threshold,alpha_high=0,alpha_low=0,window=32")
    stack.feed(1000)
    stack.steps(2)
    body = stack.caches[0].layer.body
    assert stack.allocated < 1.02 * stack.used  # no room to grow is left of the prompt
    seen = []
    for _ in range(240):
        stack.steps(1)
        seen.append(body.describe().scores[:, :900])
    changes = [i for i in range(1, 240) if (seen[i] != seen[i - 1]).any()]
    assert len(changes) == 2 and 96 <= changes[1] - changes[0] < 128


def test_scores_go_to_the_slots_of_both_tiers() -> None:
    stack = Stack("leankv:policy=threshold,window=32", layers=1)
    stack.feed(500)
    body = stack.caches[0].layer.body
    plan = body.describe().tiers.copy()
    plan[:, ::3], plan[0, 1::3] = 1, -1
    body.place(plan)
    slots = body.describe()
    assert (slots.scores[slots.positions >= 0] == 1).all()  # nothing is known yet
    scores = stack.rng.uniform(0.01, 1, slots.tiers.shape).astype(np.float32)
    body.place(slots.tiers, scores)
    held = slots.positions >= 0
    np.testing.assert_allclose(body.describe().scores[held], scores[held], rtol=0.05)


def test_tokens_that_nothing_is_known_of_are_kept() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    stack.steps(2)
    stack.feed(200)  # a further prompt
    slots = stack.caches[0].layer.body.describe()
    fresh = slots.positions >= 2002
    assert fresh.sum() >= 100 * H and (slots.scores[fresh] == 1).all()
    known = (slots.positions >= 0) & (slots.positions < 1900)
    assert slots.scores[known].max() < 0.5


def test_one_wait_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(BUDGET, layers=4)
    stack.feed(2000)
    stack.steps(3)
    waits: list[Any] = []
    real = mx.eval

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(mx, name)

        def eval(self, *args: Any) -> None:
            waits.append(args)
            real(*args)

    monkeypatch.setattr(placement, "mx", Counting())
    before = stack.slots
    stack.steps(70)
    assert stack.slots != before and len(waits) == 2  # a flush every 32 tokens


def test_a_new_prompt_is_judged_with_what_was_kept() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    stack.steps(40)
    kept = stack.slots
    stack.feed(300)  # over heads of different lengths
    assert stack.slots[0] >= kept[0] + H * 256
    stack.steps(2)
    slots = stack.caches[0].layer.body.describe()
    held = slots.positions[slots.positions >= 0]
    assert (held >= 2040).any() and (held < 2040).any()
    assert slots.scores[slots.positions >= 2040].max() < 0.5  # the new ones are judged, too


def test_chunks_are_judged_as_they_come() -> None:
    stack = Stack(f"{BUDGET},at=chunk")
    most = 0
    for _ in range(8):
        stack.feed(512)
        most = max(most, stack.slots[0])
    assert most < H * 3000


@pytest.mark.parametrize("at", ["prompt", "chunk"])
def test_what_repetition_does_not_ask_for_goes(at: str) -> None:
    model = TINY["llama"](dtype=mx.float32)
    prompt = np.random.default_rng(0).integers(0, 100, 1200).tolist()
    with attach(model, f"{BUDGET},scores=repeat,at={at}"):
        caches = make_caches(model)
        model(mx.array([prompt]), cache=caches)
        whole = [c.layer.body.slots for c in caches]
        twin = copy.deepcopy(caches)
        settle_document(model, caches, prompt)
        assert all(c.offset == 1200 for c in caches)
        kept = [c.layer.body.slots for c in caches]
        assert kept[0] < 0.6 * whole[0]
        before = [np.sort(c.layer.body.describe().positions) for c in caches]
        for _ in range(80):  # a question drops nothing further
            mx.eval(model(mx.array([[1]]), cache=caches))
        for cache, positions in zip(caches, before, strict=True):
            after = cache.layer.body.describe().positions
            assert cache.layer.body.slots > (positions >= 0).sum()
            for old, new in zip(positions, after, strict=True):
                assert set(old.tolist()) <= {*new.tolist(), -1}
        assert [c.layer.body.slots for c in twin] == whole


def test_given_scores_decide() -> None:
    stack = Stack(f"{BUDGET},pooling=1")
    stack.feed(3000)
    wanted = []
    for cache in stack.caches:
        slots = cache.layer.body.describe()
        wanted.append(mx.array((slots.positions % 7 == 0).astype(np.float32)))
    stack.caches[0].sequence.place_by(wanted)
    for cache, score in zip(stack.caches, wanted, strict=True):
        positions = cache.layer.body.describe().positions
        kept = positions[positions >= 0] % 7 == 0
        # Heads get whole blocks, so a head may lose less than one.
        assert float(score.sum()) - 32 * H < kept.sum() <= float(score.sum())
        assert kept.sum() < len(kept)  # there was room for others too


def test_copies_go_their_own_way() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    stack.feed(1)
    twin = Stack(BUDGET)
    twin.caches = copy.deepcopy(stack.caches)
    before = stack.slots
    twin.feed(1)  # with the queries of the prompt, which the copy knows, too
    assert twin.slots[0] < before[0] and stack.slots == before
    stack.feed(1)
    assert stack.slots[0] < before[0]


def test_short_prompts_lose_nothing() -> None:
    stack = Stack("leankv:policy=budget,ratio=50,window=32")
    stack.feed(LEAST_SLOTS)
    whole = stack.slots
    stack.steps(3)
    assert stack.slots == whole and whole[0] > 0


def test_a_layer_without_queries_keeps_every_token() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000, attend=False)
    whole = stack.slots
    for _ in range(100):
        stack.feed(1, attend=False)
    assert stack.slots[0] >= whole[0] and not stack.caches[0].layer.ragged


def test_reading_the_arrays_of_a_pruned_cache_is_refused() -> None:
    stack = Stack(BUDGET)
    stack.feed(2000)
    stack.steps(2)
    with pytest.raises(UnsupportedError, match="policy=keep_all"):
        stack.caches[0].make_mask(3, return_array=True)
    stack.feed(1, attend=False)
    with pytest.raises(UnsupportedError, match="policy=keep_all"):
        stack.feed(1)


@pytest.mark.parametrize("plan", [[0, -1], [1, 0]])
def test_an_array_mask_over_full_blocks_that_are_not_all_in_order_is_refused(
    plan: list[int],
) -> None:
    cache = CompressedKVCache("leankv:policy=threshold,window=32")
    rows = mx.random.normal((1, H, 4 + 64 + 32, DIM))
    cache.update_and_fetch(rows, rows)
    # All heads lose the same block, or have it in the low tier, behind the later one.
    cache.layer.body.place(np.tile(np.repeat(np.array(plan, np.int8), 32), (H, 1)))
    rows = mx.random.normal((1, H, 20, DIM))
    fetched = owner_of(*cache.update_and_fetch(rows, rows))
    assert fetched is not None
    mask = mx.ones((20, cache.offset), mx.bool_)
    with pytest.raises(UnsupportedError, match="array mask"):
        fetched.attend(rows, scale=1.0, mask=mask)


def test_a_budget_below_sink_tokens_and_window() -> None:
    stack = Stack("leankv:policy=budget,budget=100K", layers=8)
    with pytest.raises(ConfigError, match="budget=102400 bytes is too small"):
        stack.feed(100)


def test_a_budget_that_the_observed_queries_break_is_told_when_they_are_known() -> None:
    stack = Stack("leankv:policy=budget,ratio=1.5,budget=110000,window=32")
    stack.feed(1500)
    stack.feed(1)
    twin = copy.deepcopy(stack.caches)  # a copy, or a file, of what was begun is not refused
    offsets = [cache.offset for cache in stack.caches]
    for caches in (stack.caches, twin):
        with pytest.raises(ConfigError, match="budget=110000 bytes is too small"):
            Sequences.of(caches).end_prompt()
    with pytest.raises(ConfigError, match="a larger budget"):
        stack.feed(1)
    assert [cache.offset for cache in stack.caches] == offsets


def test_queries_that_overflow_say_nothing() -> None:
    stack = Stack("leankv:policy=budget,ratio=8,window=32,low=k3v2")
    stack.feed(1500)
    for cache in stack.caches:
        nothing = mx.full((H * G, 64, DIM), mx.nan)
        cache.layer.observations.add(nothing, None, cache.offset, 1.0, None)
    Sequences.of(stack.caches).end_prompt()
    assert all(slots >= H * 300 for slots in stack.slots)
    stack.steps(40)


def test_a_trim_that_leaves_no_exact_row_leaves_what_can_be_judged() -> None:
    stack = Stack(f"{BUDGET},sink_tokens=0,at=chunk")
    stack.feed(1500)
    stack.feed(500)
    for cache in stack.caches:
        cache.trim(50)
    assert stack.caches[0].layer.observed and stack.caches[0].layer.exact.k.shape[1] == 0
    before = stack.slots
    stack.feed(20)
    assert stack.slots[0] < before[0]
    assert all(cache.offset == 1970 for cache in stack.caches)


def test_layers_with_bits_of_their_own() -> None:
    model = TINY["llama"](dtype=mx.float32)
    config = CompressionConfig.parse("leankv:layer_bits=k4v4/k3v3/k8v8,window=32")
    with attach(model, config):
        caches = make_caches(model)
        model(mx.arange(120)[None], cache=caches)
        assert [(c.config.k_bits, c.config.v_bits) for c in caches] == [(4, 4), (3, 3), (8, 8)]
        used = [c.memory().codes for c in caches]
        assert used[1] < used[0] < used[2]
    with attach(model, "leankv:layer_bits=k4v4/k8v8"), pytest.raises(ConfigError, match="3 that"):
        make_caches(model)


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_model_goes_on_after_dropping(name: str) -> None:
    model = TINY[name](dtype=mx.float32)
    outs = {}
    for backend in ("reference", "cpu"):
        kv = f"leankv:policy=streaming,window=32,backend={backend}"
        with attach(model, kv) as attachment:
            if not attachment.compressed_layers:
                return
            caches = make_caches(model)
            tokens = np.random.default_rng(0).integers(0, 100, (1, 300))
            model(mx.array(tokens), cache=caches)
            steps = [model(mx.array([[i]]), cache=caches)[0, -1] for i in range(40)]
            steps.append(model(mx.array(tokens[:, :50]), cache=caches)[0, -1])
            outs[backend] = np.array(mx.stack(steps).astype(mx.float32))
            fused = any(row.attention == "fused" for row in attachment.report)
            # A layer that hands over no queries keeps everything.
            ragged = [c.layer.ragged for c in _ours(caches) if c.layer and c.layer.body]
            assert ragged and set(ragged) == {fused}
    np.testing.assert_allclose(outs["cpu"], outs["reference"], atol=2e-3)


def _ours(caches: list[Any]) -> list[CompressedKVCache]:
    return [c for c in caches if isinstance(c, CompressedKVCache)]
