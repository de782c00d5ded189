"""Requests to a model through the store: what each gets is what it gets alone, and what several
have in common is held once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from leankv_mlx import attach
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.serving import PromptStore, held
from tests.cache.prompt_files import content
from tests.mlx_lm import test_prompt_store as of_mlx_lm
from tests.mlx_lm.test_prompt_store import DOCUMENT, LEAN, POLICIES, QUESTIONS
from tests.models import TINY

PLAIN = "leankv:window=32"


class Server(of_mlx_lm.Server):
    """The same requests with our store in the place of mlx-lm's."""

    def __init__(self, model: nn.Module, **limits: Any) -> None:
        super().__init__(model)
        self.store: Any = PromptStore(**limits)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"](dtype=mx.float32)


@pytest.mark.parametrize("kv", POLICIES)
def test_no_request_answers_from_what_another_one_kept(kv: str, model: nn.Module) -> None:
    with attach(model, kv):
        server = Server(model)
        for question in QUESTIONS:
            prompt = DOCUMENT + question
            reply, first = server.ask(prompt)
            alone, expected = Server(model).ask(prompt)
            assert server.reused == 0 and reply == alone
            np.testing.assert_array_equal(first, expected)
        server.ask(DOCUMENT[:700])
        assert server.reused == 0
        held_before = len(prompt) + len(reply)
        server.ask([*prompt, *reply, *QUESTIONS[1]])  # the next turn
        assert server.reused == held_before


def test_a_prompt_that_was_answered_is_asked_again(model: nn.Module) -> None:
    """mlx-lm's store leaves no token to be read, and its batches refuse such a prompt."""
    with attach(model, PLAIN):
        server, prompt = Server(model), DOCUMENT[:100]
        reply, _ = server.ask(prompt)
        assert server.store.fetch_nearest_cache("key", [*prompt, *reply])[1] == reply[-1:]
        server.ask(prompt)
        assert server.reused == len(prompt) - 1


def test_requests_on_one_document_hold_it_once(model: nn.Module) -> None:
    with attach(model, PLAIN):
        server = Server(model, max_size=100)
        server.ask(DOCUMENT + QUESTIONS[0])
        alone = server.store.nbytes
        for i in range(15):
            server.ask([*DOCUMENT, i, *QUESTIONS[1 + i % 3]])
            assert server.reused == len(DOCUMENT)
        assert len(server.store) == 16
        assert server.store.nbytes == held(server.store.lists).used
        once = server.store.held()
        assert once.shared > 10 * alone and once.sequences == 16
        assert once.used < 4 * alone  # each has exact rows of its own


def test_the_limit_means_real_bytes(model: nn.Module) -> None:
    with attach(model, PLAIN):
        server = Server(model, max_size=100)
        server.ask(DOCUMENT + QUESTIONS[0])
        for i in range(7):
            server.ask([*DOCUMENT, i])
        caches, _ = server.store.fetch_nearest_cache("key", [*DOCUMENT, 9, 9])
        before = server.store.nbytes
        counted_again = sum(held([entry]).used for entry in server.store.lists)
        server.store.trim_to(n_bytes=before)
        assert len(server.store) == 8 and before < counted_again / 1.5
        together = server.store.held([caches])
        assert before < together.used < before + held([caches]).used
        server.store.trim_to(n_bytes=before, running=[caches])  # what runs is counted, too
        assert 0 < len(server.store) < 8
        assert server.store.held([caches]).used <= before
        assert server.store.nbytes == held(server.store.lists).used
        server.store.trim_to(n_bytes=0)
        assert len(server.store) == 0 == server.store.nbytes
        limited = Server(model, max_size=100, max_bytes=before)
        for i in range(12):
            limited.ask([*DOCUMENT, i, *QUESTIONS[0]])
            assert limited.store.nbytes <= before
        assert 1 < len(limited.store) < 12


def test_copies_leave_what_is_kept_as_it_is(model: nn.Module) -> None:
    with attach(model, PLAIN):
        server = Server(model)
        prompt = DOCUMENT + QUESTIONS[0]
        server.ask(prompt)
        kept = content(server.store.lists[0])
        for cut in (3, 30, 200, 880):
            caches, _ = server.store.fetch_nearest_cache("key", [*DOCUMENT[:cut], 99, 98])
            assert caches[0].offset == cut and caches[0].sequence is caches[-1].sequence
            model(mx.array([[99] * 70]), cache=caches)
            mx.eval([cache.state for cache in caches])
        assert content(server.store.lists[0]) == kept
        assert (server.store.hits, server.store.misses) == (4, 1)
        assert server.store.reused == 3 + 30 + 200 + 880


def test_kinds_are_told_as_mlx_lm_tells_them(model: nn.Module) -> None:
    with attach(model, LEAN):
        store = PromptStore()
        for i, kind in enumerate(["system", "user", "user"]):
            caches = make_caches(model)
            model(mx.array([DOCUMENT[i : i + 100]]), cache=caches)
            store.insert_cache("key", [i, 5], caches, cache_type=kind)
        stats = store.stats_by_type()
        assert [stats[kind]["n_sequences"] for kind in ("assistant", "user", "system")] == [0, 2, 1]
        assert sum(kind["n_bytes"] for kind in stats.values()) == store.nbytes
        store.insert_cache("key", [], make_caches(model))  # nothing to find it by
        assert len(store) == 3
