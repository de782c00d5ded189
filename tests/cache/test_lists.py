"""What is said to all caches of a model at once: where a prompt ends, what is a prefix of it, and
which drafts are taken back.

The kinds of fault: a policy that takes one kind of call for another, and a cache that goes on with
a prompt it was not judged by.
"""

from __future__ import annotations

from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import can_trim_prompt_cache

from leankv_mlx import attach
from leankv_mlx.cache import CompressedKVCache, Sequences
from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.repetition import settle_document
from tests.cache.test_budget import KV, NBYTES
from tests.cache.test_placement import Stack
from tests.models import TINY

LEAN = "leankv:policy=budget,ratio=12,window=32"
RNG = np.random.default_rng(0)
DOCUMENT = RNG.integers(0, 100, 900).tolist()
QUESTIONS = [RNG.integers(0, 100, n).tolist() for n in (30, 25, 5, 12)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"](dtype=mx.float32)


@pytest.mark.parametrize("size", [3, 9, 40])
def test_steps_of_any_size_after_the_end_of_the_prompt_are_no_prompt(size: int) -> None:
    stack = Stack(KV)
    with Sequences.of(stack.caches).reading(1500, step=size):
        stack.feed(1500)
        for step in range(1200 // size):
            stack.feed(size)
            assert step < 1 or stack.allocated <= NBYTES
        assert stack.allocated > 0.6 * NBYTES


def test_a_prompt_that_is_told_of_stays_whole_until_it_is_in() -> None:
    for chunk in (3, 8, 9, 40):
        stack = Stack("leankv:policy=budget,ratio=8,window=32", layers=1)
        with Sequences.of(stack.caches).reading(40 * chunk + 601):
            stack.feed(600)
            for _ in range(40):
                stack.feed(chunk)
            assert not stack.caches[0].layer.ragged, chunk
            stack.feed(1)
            assert not stack.caches[0].layer.ragged
            stack.feed(1)
            assert stack.caches[0].layer.ragged and not stack.caches[0].is_trimmable()


def test_copies_and_files_know_what_they_are_a_prefix_of() -> None:
    stack = Stack(LEAN)
    stack.feed(2000)
    Sequences.of(stack.caches).end_prompt()
    stack.feed(1)
    files = [CompressedKVCache.from_state(cache.state) for cache in stack.caches]
    for caches, first in ((stack.caches, 2000), (deepcopy(stack.caches), 2000), (files, 2001)):
        assert not can_trim_prompt_cache(caches)
        found = Sequences.of(caches)
        assert found.is_prefix(first) and not found.is_prefix(first - 1)


def test_a_document_judged_by_itself_is_a_beginning_of_every_question(model: nn.Module) -> None:
    with attach(model, f"{LEAN},scores=repeat"):
        caches = make_caches(model)
        with Sequences.of(caches).reading():
            model(mx.array([DOCUMENT]), cache=caches)
        settle_document(model, caches, DOCUMENT)
        assert not can_trim_prompt_cache(caches)
        for question in QUESTIONS:
            model(mx.array([question]), cache=caches)
            found = Sequences.of(caches)
            assert found.is_prefix(len(DOCUMENT)) and not found.is_prefix(len(DOCUMENT) - 1)
            for cache in caches:
                cache.trim(cache.offset - len(DOCUMENT))


def test_rejected_drafts_are_taken_back_from_the_window_alone() -> None:
    stack = Stack(LEAN)
    stack.feed(2000)
    Sequences.of(stack.caches).end_prompt()
    stack.feed(6)
    recent = stack.caches[0].layer.recent
    assert Sequences.of(stack.caches).rewind(4) == 4 and stack.caches[0].offset == 2002
    with pytest.raises(DroppedTokensError, match=f"takes back {recent} tokens"):
        Sequences.of(stack.caches).rewind(recent)
    assert stack.caches[0].offset == 2002
