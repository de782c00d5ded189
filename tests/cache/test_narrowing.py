"""When a mask of key channels acts: codes keep all of them until the prompt is in, and then what
the mask keeps, bit for bit."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from numpy.typing import NDArray

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache, Sequences
from leankv_mlx.cache.layer import Layer
from leankv_mlx.kernels import Centers
from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.mlx_lm import attach
from leankv_mlx.mlx_lm.attachment import make_caches
from tests.cache.test_masks import BACKENDS, DIM, GROUPS, HEADS, SINKS, V_DIM, Run, channels
from tests.models import TINY

Array = NDArray[Any]
LOW = "leankv:k8v4,mask=some,window=32,policy=threshold,low=k3v2"


def decoded(layer: Layer) -> list[tuple[Array, Array]]:
    """Keys and values of the stored tokens of each head, without their centers."""
    assert layer.body is not None
    zeros = Centers(*map(mx.zeros_like, layer.body.centers))
    parts: list[list[tuple[Array, Array]]] = [[] for _ in range(HEADS)]
    for tier in layer.body.views():
        k, v = (np.array(x) for x in dequantize_ops(tier, zeros, mx.float32))
        for head, length in enumerate(np.array(tier.lengths)):
            parts[head].append((k[head, :length], v[head, :length]))
    return [
        (np.concatenate([k for k, _ in part]), np.concatenate([v for _, v in part]))
        if part
        else (np.zeros((0, DIM)), np.zeros((0, V_DIM)))
        for part in parts
    ]


def known(layer: Layer) -> list[list[Any]]:
    """Position, tier and score of the stored tokens of each head."""
    assert layer.body is not None
    slots = layer.body.describe()
    return [
        [x[head][slots.positions[head] >= 0].tolist() for x in (slots.positions, slots.tiers,
                                                                slots.scores)]
        for head in range(HEADS)
    ]  # fmt: skip


def placed(run: Run, seed: int) -> None:
    """Tokens go and move to the low tier, of each head others."""
    body = run.layer.body
    assert body is not None
    tiers = body.describe().tiers
    draw = np.random.default_rng(seed)
    body.place(np.where(tiers < 0, -1, draw.integers(-1, 2, tiers.shape)).astype(np.int8),
               draw.uniform(0, 1, tiers.shape).astype(np.float32))  # fmt: skip


@pytest.mark.parametrize("groups", [GROUPS, (0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("kv", ["leankv:k3v4,mask=some", LOW])
def test_what_is_kept_stays_as_it_is(kv: str, groups: tuple[int, ...]) -> None:
    run = Run(kv, channels(groups))
    run.step(600, 0)
    if "low" in kv:
        placed(run, 0)
    twin = run.copy()
    before, was = decoded(run.layer), known(run.layer)
    blocks = [bytes(memoryview(t.pool.array.reshape(-1))) for t in twin.layer.tables]
    run.cache.sequence.narrow()
    after, now = decoded(run.layer), known(run.layer)
    for head, kept in enumerate(groups):
        for x, y, dims in zip(before[head], after[head], (32 * kept, V_DIM), strict=True):
            assert np.array_equal(x[:, :dims], y[:, :dims]) if kept else not len(y)
            assert not y[:, dims:].any()
        assert now[head] == (was[head] if kept else [[], [], []])
    assert [bytes(memoryview(t.pool.array.reshape(-1))) for t in twin.layer.tables] == blocks
    assert all(np.array_equal(x, y) for one, other in zip(before, decoded(twin.layer), strict=True)
               for x, y in zip(one, other, strict=True))  # fmt: skip
    body = run.layer.body
    assert body is not None
    assert all(table.pool.capacity == table.blocks for table in body.tables)
    held = [table.pool for table in body.tables]
    run.cache.sequence.narrow()  # there is nothing left to do
    assert [table.pool for table in body.tables] == held


def test_a_mask_waits_for_the_end_of_a_prompt_that_is_told() -> None:
    run = Run("leankv:k4v4,mask=some")
    with run.cache.sequence.reading(330):
        for i, tokens in enumerate((200, *(5,) * 26)):
            run.step(tokens, 10 * i)
            assert not run.layer.narrowed and not run.layer.ragged
        run.check()
        run.step(1, 900)
        assert run.layer.narrowed and run.layer.ragged
        run.check()
    for i in range(80):
        run.step(1, 1000 + i)
    run.check()


def test_where_nobody_tells_the_sizes_of_updates_do() -> None:
    run = Run("leankv:k4v4,mask=some")
    for i, tokens in enumerate((200, 130, 1)):  # the last of a prompt comes by itself
        run.step(tokens, 10 * i)
        assert not run.layer.narrowed
        run.check()
    run.step(1, 50)
    assert run.layer.narrowed
    run.check()
    drafts = Run("leankv:k4v4,mask=some")
    drafts.step(200, 0)
    drafts.step(4, 1)
    drafts.cache.sequence.verified(2)
    drafts.trim(2)
    drafts.step(4, 2)
    assert drafts.layer.narrowed
    drafts.check()


def test_later_prompts_enter_masked() -> None:
    run = Run("leankv:k4v4,mask=some")
    run.step(200, 0)
    run.reply()
    for i, tokens in enumerate((1, 1, 150, 90, 1, 1)):
        run.step(tokens, 10 * i + 5)
        run.check()
    formats = {tier.format.k_bits for tier in run.layer.view().tiers}
    assert formats == {(4, 4, 4), (4, 4, 0)} and run.whole < run.left - 200


def test_a_prompt_is_a_beginning_of_no_other_once_its_mask_acts() -> None:
    """Or what a mask does within a prompt would depend on which one was read before."""
    run = Run("leankv:k4v4,mask=some")
    run.step(200, 0)
    sequence = run.cache.sequence
    assert run.cache.is_trimmable() and sequence.is_prefix(50)
    run.reply()
    for i in range(4):
        run.step(1, i)
    copies = run.copy(), run
    for each in copies:
        found = each.cache.sequence
        assert not each.cache.is_trimmable() and not found.is_prefix(199)
        assert found.is_prefix(200)  # what goes on from all of it may be another reply
        found.verified(150)  # and drafts are taken back at any depth


@pytest.mark.parametrize("equalize", ["on", "off"])
def test_a_prompt_that_stays_in_the_window(equalize: str) -> None:
    """All that comes to the body is masked."""
    run = Run(f"leankv:k4v4,mask=some,equalize={equalize}")
    run.step(40, 0)
    run.reply()
    assert run.layer.body is None
    for i in range(120):
        run.step(1, 10 * i)
    assert run.left and not run.whole
    run.check()


def test_copies_end_their_prompts_each_by_itself() -> None:
    """Also while they have rows in common: what one made codes of may not be the other's codes."""
    run = Run("leankv:k4v4,mask=some")
    run.step(400, 0)
    copies = [run.copy() for _ in range(3)]
    with copies[0].cache.sequence.reading():
        for i in range(45):
            for j, each in enumerate(copies):
                if j == 1 and i == 10:
                    each.reply()
                each.step(1, 1000 * j + 10 * i)
                each.check()
    assert [each.layer.narrowed for each in copies] == [False, True, True]
    copies[0].reply()
    later = [copies[1].copy(), copies[0].copy()]
    for each in (*copies, *later):
        for tokens in (1, 40, 1):
            each.step(tokens, 7000 + tokens)
            each.check()
    for one, other in ((copies[1], later[0]), (copies[0], later[1])):
        bodies = one.layer.body, other.layer.body
        assert bodies[0] and bodies[1]
        for mine, its in zip(bodies[0].tables, bodies[1].tables, strict=True):
            assert mine.pool is its.pool  # they share what was narrowed before


def test_nothing_holds_the_blocks_of_before() -> None:
    """Not for copies either, which look for codes of the rows that all have in common."""
    run = Run("leankv:k4v4,mask=some")
    run.step(400, 0)
    other = run.copy()
    assert run.layer.body is not None
    pool = weakref.ref(run.layer.body.tables[0].pool)
    for i in range(33):
        for each in (run, other):
            with each.cache.sequence.reading():
                each.step(1, i)
    for each in (run, other):
        assert each.layer.exact_arrays[0] is run.layer.exact_arrays[0]  # they have some yet
        assert pool() is not None
        each.reply()
    gc.collect()
    assert pool() is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_sequences_in_different_phases(backend: str) -> None:
    alone = [Run(f"leankv:k4v4,mask=some,backend={backend}") for _ in range(3)]
    for i, tokens in enumerate((300, 220, 130)):
        alone[i].step(tokens, i)
    alone[0].reply()
    with alone[2].cache.sequence.reading():
        batch = BatchedKVCache.merge([run.cache for run in alone])
        for i in range(50):
            rows = [run.rows(100 * i + 10 * j, 1) for j, run in enumerate(alone)]
            q, k, v = (mx.concatenate(parts) for parts in zip(*rows, strict=True))
            together = batch.update(k, v).attend(q, scale=DIM**-0.5, mask=None)
            for j, run in enumerate(alone):
                q, k, v = rows[j]
                mine = run.cache.update(k, v).attend(q, scale=DIM**-0.5, mask=None)
                assert mx.array_equal(together[j], mine[0]), (i, j)
    for layers in ([run.layer for run in alone], [row.layer for row in batch.rows]):
        assert [layer.narrowed for layer in layers if layer] == [True, True, False]
        first, second, third = (layer.kind for layer in layers if layer)
        assert first == second != third  # one operation has sequences of the same formats


def test_cutting_within_a_prompt_and_after_it() -> None:
    run = Run("leankv:k8v4,mask=some,window=64")
    run.step(330, 0)
    run.trim(330 - SINKS - 160)  # to a whole block, of which nothing need be decoded
    assert not run.layer.narrowed
    for tokens in (50, 90):
        run.step(tokens, tokens)
        run.check()
    run.reply()
    run.trim(130)
    for tokens in (1, 60, 1):
        run.step(tokens, 500 + tokens)
        run.check()
    run.trim(run.cache.offset - 3)
    assert run.layer.body is None and run.layer.narrowed
    for tokens in (150, 60, 1):
        run.step(tokens, 900 + tokens)
        run.check()
    assert not run.whole


def test_a_budget_holds_more_tokens_of_a_masked_cache() -> None:
    """Bytes are counted once it is narrowed; before, when nobody tells of a prompt, too."""
    slots = []
    for groups in ((3, 3, 3, 3), (1, 1, 1, 1)):
        run = Run(
            "leankv:k8v4,mask=some,window=32,policy=budget,ratio=1.01,budget=600K", channels(groups)
        )
        with run.cache.sequence.reading(1200):
            run.step(1200, 0)
            assert run.layer.memory().allocated > 600 * 1024
            for i in range(40):
                run.step(1, 10 * i + 1)
                assert run.layer.memory().allocated <= 600 * 1024
        run.check()
        assert run.layer.body is not None
        slots.append(run.layer.body.slots)
    assert slots[1] > 1.5 * slots[0]


def test_the_loops_of_mlx_lm() -> None:
    model = TINY["llama"]()
    kept = channels((1, 0), model.args.head_dim or 32)
    with attach(model, "k4v4,window=32,mask=some", learned=[kept] * len(model.layers)):
        for prompt in (150, 3):
            caches: Any = make_caches(model)
            steps = generate_step(
                mx.arange(prompt), model, max_tokens=90, prompt_cache=caches, prefill_step_size=64
            )
            next(steps)
            assert not any(cache.layer.narrowed for cache in caches if cache.offset == prompt)
            for _ in steps:
                pass
            assert all(cache.layer.narrowed and cache.layer.ragged for cache in caches)
        twins = deepcopy(caches)
        Sequences.of(twins).end_prompt()
        assert all(cache.layer.narrowed for cache in twins)


def test_a_cache_without_a_mask_has_nothing_to_narrow() -> None:
    cache = CompressedKVCache("leankv:k4v4")
    cache.update(mx.zeros((1, 1, 200, 32)), mx.zeros((1, 1, 200, 32)))
    assert not cache.sequence.settles
    cache.sequence.end_prompt()
    cache.sequence.narrow()
    assert cache.layer is not None and not cache.layer.narrowed
