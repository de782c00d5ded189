"""mlx-lm's own store of prompts with caches that drop tokens.

The kind of fault: one request answers from what another one kept. The store is asked as
`mlx_lm.server` asks it: fetched by the tokens of a request, put back under these and the reply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import LRUPromptCache

from leankv_mlx import attach
from leankv_mlx.cache import Sequences, owner_of
from leankv_mlx.engine.conversation import Conversation
from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.prompts import shared
from tests.cache.test_placement import Stack
from tests.models import TINY

LEAN = "leankv:policy=budget,ratio=12,window=32"
POLICIES = [
    LEAN,
    f"{LEAN},low=k3v2",
    "leankv:policy=threshold,window=32,alpha_high=8,alpha_low=2",
    "leankv:policy=streaming,window=32",
]
RNG = np.random.default_rng(0)
DOCUMENT = RNG.integers(0, 100, 900).tolist()
QUESTIONS = [RNG.integers(0, 100, n).tolist() for n in (30, 25, 5, 12)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"](dtype=mx.float32)


class Server:
    """What `mlx_lm.server` does with its store for requests one by one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.store = model, LRUPromptCache(10)
        self.reused = 0

    def ask(self, prompt: list[int], tokens: int = 6) -> tuple[list[int], np.ndarray]:
        """The reply and the logprobs of its first token."""
        from importlib import import_module

        cache, rest = self.store.fetch_nearest_cache("key", prompt[:])
        self.reused = len(prompt) - len(rest)
        cache = cache or make_caches(self.model)
        key, first = prompt[:], None
        loop = vars(import_module("mlx_lm.generate"))["generate_step"]
        for token, logprobs in loop(mx.array(rest), self.model, prompt_cache=cache,
                                    max_tokens=tokens):  # fmt: skip
            first = np.array(logprobs) if first is None else first
            key.append(token)
        self.store.insert_cache("key", key, cache)
        assert first is not None and cache[0].offset == len(key)
        return key[len(prompt) :], first


@pytest.fixture(params=POLICIES)
def server(model: nn.Module, request: Any) -> Iterator[Server]:
    with attach(model, request.param):
        yield Server(model)


def test_no_request_answers_from_what_another_one_kept(server: Server) -> None:
    for question in QUESTIONS:
        prompt = DOCUMENT + question
        reply, first = server.ask(prompt)
        alone, expected = Server(server.model).ask(prompt)
        assert server.reused == 0 and reply == alone
        np.testing.assert_array_equal(first, expected)


def test_a_shorter_request_is_not_answered_from_a_longer_one(server: Server) -> None:
    server.ask(DOCUMENT + QUESTIONS[0])
    server.ask(DOCUMENT[:700])
    assert server.reused == 0


def test_the_next_turn_of_the_same_conversation_is_served_from_it(server: Server) -> None:
    prompt = DOCUMENT + QUESTIONS[0]
    reply, _ = server.ask(prompt)
    for question in QUESTIONS[1:]:
        held = len(prompt) + len(reply)
        prompt = [*prompt, *reply, *question]
        reply, _ = server.ask(prompt)
        assert server.reused == held
    assert all(not cache.is_trimmable() for cache in server.store._trie.get(
        "key", [*prompt, *reply]).prompt_cache)  # fmt: skip


def test_what_nothing_was_dropped_of_is_shared(model: nn.Module) -> None:
    with attach(model, LEAN):
        server = Server(model)
        for question in QUESTIONS:
            server.ask(DOCUMENT[:150] + question)  # too short to lose anything
            assert server.reused in (0, 150)
    assert server.reused == 150


class _Plain:
    """A tokenizer without a template; tokens are numbers."""

    has_chat_template = False


def _talk(conversation: Conversation, prompt: list[int], model: nn.Module) -> int:
    """One turn as the engine takes it; how much of the cache it kept."""
    from importlib import import_module

    kept = conversation.reuse(prompt)
    loop = vars(import_module("mlx_lm.generate"))["generate_step"]
    rest = mx.array(prompt[kept:])
    reply = [t for t, _ in loop(rest, model, prompt_cache=conversation.caches, max_tokens=5)]
    conversation.settle(prompt, reply)
    return kept


def test_a_chat_keeps_what_goes_on_and_nothing_of_another_question(model: nn.Module) -> None:
    with attach(model, LEAN):
        conversation = Conversation(model, _Plain())
        first = DOCUMENT + QUESTIONS[3]
        assert _talk(conversation, first, model) == 0
        assert _talk(conversation, first, model) == len(first) - 1  # asked again
        following = [*conversation.tokens, *QUESTIONS[1]]
        assert _talk(conversation, following, model) >= len(first)  # the next turn
        assert shared(conversation.tokens, DOCUMENT + QUESTIONS[2]) >= len(DOCUMENT)
        assert _talk(conversation, DOCUMENT + QUESTIONS[2], model) == 0  # another question


def test_arrays_of_a_cache_that_dropped_tokens_are_refused_where_they_are_read() -> None:
    stack = Stack(LEAN)
    stack.feed(2000)
    Sequences.of(stack.caches).end_prompt()
    q, rows = mx.zeros((1, 4, 3, 64)), mx.zeros((1, 2, 3, 64))
    for n in (3, 20):
        cache = stack.caches[0]
        keys, values = cache.update_and_fetch(*[mx.zeros((1, 2, n, 64), mx.float16)] * 2)
        assert keys.shape[:2] == (1, 2) and keys.ndim == 4
        for read in (
            lambda keys=keys: keys + 1, lambda keys=keys: q[:, :2] + keys,
            lambda keys=keys: keys @ q, lambda keys=keys: keys[..., -3:, :],
            lambda keys=keys: keys.swapaxes(-1, -2), lambda values=values: np.array(values),
            lambda values=values: mx.array(values), lambda keys=keys: len(keys),
        ):  # fmt: skip
            with pytest.raises(DroppedTokensError, match="policy=keep_all"):
                read()
        with pytest.raises(TypeError):
            mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0)
        assert owner_of(keys, values) is not None
        mx.eval(owner_of(keys, values).attend(q[:, :, :n], scale=1.0, mask="causal"))
    assert rows is not None
