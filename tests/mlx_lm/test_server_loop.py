"""The generation loop of the server, asked as its HTTP handler asks it."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from threading import Timer
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from leankv_mlx.errors import (
    ClientLeftError,
    ContextLengthError,
    MemoryLimitError,
    RequestError,
    ServingError,
)
from leankv_mlx.mlx_lm.serving import report, running
from leankv_mlx.mlx_lm.serving.batch import Batch, rest_of
from leankv_mlx.mlx_lm.serving.client import Client
from leankv_mlx.mlx_lm.serving.request import Guarded
from leankv_mlx.serving import Held, PromptStore
from tests.mlx_lm.loops import Server, serving, stream_numbers
from tests.models import TINY, VOCAB

RNG = np.random.default_rng(0)


def drawn(tokens: int) -> list[int]:
    return RNG.integers(1, VOCAB, tokens).tolist()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"](dtype=mx.float32)


@pytest.fixture(autouse=True)
def look_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_EVERY_S", 0.0)


@pytest.fixture
def server(model: nn.Module) -> Iterator[Server]:
    with serving(model) as found:
        yield found


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(server: Server) -> bool:
    sequences = server.report["sequences"]
    return sequences["running"] == sequences["waiting"] == 0


# Replies.


def test_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    prompts = [drawn(n) for n in (1, 2, 5, 40, 129, 200, 300, 77, 9, 12, 500, 33)]
    asked = [server.ask(prompt, 4 + i) for i, prompt in enumerate(prompts)]
    for i, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
        assert one.wait().error is one.refused is None
        assert one.reason == "length"
        assert one.reply == server.alone(prompt, 4 + i)
    until(lambda: idle(server))
    assert server.report["requests"] == {"finished": 12, "failed": 0, "left": 0}
    assert server.report["generated_tokens"] == sum(range(4, 16))


def test_a_reply_ends_with_the_models_context(server: Server) -> None:
    asked = server.ask(drawn(4090), 500).wait()
    assert len(asked.reply) == 6 and asked.reason == "length"


def test_requests_that_go_alone_wait_for_the_others_and_hold_up_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.generator.server, "stream_generate", stream_numbers)
    prompts = [drawn(20) for _ in range(9)]
    asked = [server.ask(p, 6, seed=1 if i % 3 == 1 else None) for i, p in enumerate(prompts)]
    for prompt, one in zip(prompts, asked, strict=True):
        assert one.wait().reply == server.alone(prompt, 6)


# What cannot be.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"prompt": []}, RequestError, "prompt is empty"),
        ({"prompt": [5, VOCAB]}, RequestError, f"token {VOCAB}"),
        ({"prompt": [5] * 4096}, ContextLengthError, "4096 tokens"),
        ({"logit_bias": {VOCAB: 1.0}}, RequestError, f"token {VOCAB}"),
        ({"logit_bias": {-1: 1.0}}, RequestError, "token -1"),
        ({"top_k": VOCAB, "temperature": 1.0}, RequestError, "top_k"),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.9, "temperature": 1.0}, RequestError, "0.5"),
        ({"stop_words": [["x"]]}, RequestError, "cannot be used"),
        ({"stop_words": ["x"]}, RequestError, "invalid literal"),  # of the tokenizer
        ({"model": "missing"}, ValueError, "no such model"),
    ],
)
def test_a_bad_request_is_refused_beside_good_ones(
    server: Server, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    good, prompt = drawn(30), options.pop("prompt", [1, 2, 3])
    before = server.ask(good, 12)
    bad = server.ask(prompt, 8, **options)
    after = server.ask(good, 12)
    assert isinstance(bad.wait().refused, error) and text in str(bad.refused)
    assert bad.context is None  # nothing was promised
    assert before.wait().reply == after.wait().reply == server.alone(good, 12)


@pytest.mark.parametrize("where", ["processor", "sampler", "detokenizer"])
def test_what_fails_in_a_step_is_one_request(
    server: Server, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def fail(*arrays: Any) -> Any:
        calls[0] += 1
        if calls[0] > 3:
            raise KeyError("two\nlines")
        return arrays[-1] if where == "processor" else mx.array([7] * arrays[-1].shape[0])

    options: dict[str, Any] = {}
    generator = server.generator.server
    if where == "processor":
        make = generator._make_logits_processors
        monkeypatch.setattr(
            generator, "_make_logits_processors",
            lambda args: [fail] if args.logits.logit_bias else make(args),
        )  # fmt: skip
        options = {"logit_bias": {3: 0.0}}
    elif where == "sampler":
        make = generator._make_sampler
        monkeypatch.setattr(
            generator, "_make_sampler",
            lambda args, tokenizer: fail if args.sampling.top_k else make(args, tokenizer),
        )  # fmt: skip
        options = {"top_k": 3, "temperature": 1.0}
    else:
        add = "tests.mlx_lm.loops.Detokenizer.add_token"
        original = __import__("tests.mlx_lm.loops", fromlist=["x"]).Detokenizer.add_token

        def add_token(self: Any, token: int) -> None:
            original(self, token)
            if getattr(self, "bad", False):
                raise KeyError("two\nlines")

        monkeypatch.setattr(add, add_token)
        made = running.Running.start

        def start(self: Any, request: Any, caches: Any) -> None:
            request.detokenizer.bad = len(request.prompt) == 31
            made(self, request, caches)

        monkeypatch.setattr(running.Running, "start", start)
    good = [drawn(20), drawn(30), drawn(25)]
    beside = [server.ask(prompt, 30) for prompt in good]
    bad = server.ask(drawn(31), 30, **options)
    assert isinstance(bad.wait().error, ServingError)
    assert "two lines" in str(bad.error).replace("\\n", " ") and len(bad.reply) < 4
    for prompt, one in zip(good, beside, strict=True):
        assert one.wait().reply == server.alone(prompt, 30)
    until(lambda: idle(server))
    assert server.report["requests"] == {"finished": 3, "failed": 1, "left": 0}


def test_a_prompt_that_cannot_be_read_is_found_among_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Batch.__init__
    bad = drawn(50)

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        read = self._read

        def failing(tokens: list[list[int]]) -> None:
            read(tokens)
            if any(bad[:20] == part[:20] for part in tokens):
                raise MemoryError("no room")

        self._read = failing

    monkeypatch.setattr(Batch, "__init__", init)
    replied = server.ask(drawn(10), 200)
    until(lambda: len(replied.reply) > 2)
    prompts = [drawn(n) for n in (30, 45, 50)]
    asked = [server.ask(prompt) for prompt in [*prompts[:2], bad, prompts[2]]]
    found = asked.pop(2)
    assert "no room" in str(found.wait().error) and not found.reply
    for prompt, one in zip(prompts, asked, strict=True):
        assert one.wait().reply == server.alone(prompt)
    assert replied.wait().reply == server.alone(replied.prompt, 200)


def test_a_step_that_fails_ends_those_in_it_and_the_next_begin_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Batch.step
    broken = [True]

    def step(self: Any) -> Any:
        if broken[0] and any(len(getattr(x[0], "rows", ())) == 2 for x in self.lists if x):
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
        return original(self)

    monkeypatch.setattr(Batch, "step", step)
    asked = [server.ask(drawn(20), 300), server.ask(drawn(20), 300)]
    for one in asked:
        assert "Unable to allocate" in str(one.wait().error)
    broken[0] = False
    prompt = drawn(20)
    assert server.ask(prompt).wait().reply == server.alone(prompt)
    until(lambda: idle(server))
    assert server.report["requests"] == {"finished": 1, "failed": 2, "left": 0}


def test_an_error_that_nobody_can_be_blamed_for_does_not_end_the_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(running.Running, "balance", lambda *_: 1 / 0)
        asked = server.ask(drawn(20)).wait()
        assert "ZeroDivisionError" in str(asked.error)
    prompt = drawn(20)
    assert server.ask(prompt).wait().reply == server.alone(prompt)


def test_long_prompts_are_read_one_or_two_at_a_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, reading = Batch.step, [0]

    def step(self: Any) -> Any:
        found = original(self)
        reading.append(len(self._prompts.uids))
        return found

    monkeypatch.setattr(Batch, "step", step)
    asked = [server.ask(drawn(500), 2) for _ in range(6)]
    assert all(len(one.wait().reply) == 2 for one in asked)
    assert max(reading) <= 2


# Those who leave.


@pytest.mark.parametrize("stage", ["waiting", "reading", "replying"])
def test_who_leaves_frees_its_rows(model: nn.Module, stage: str) -> None:
    with serving(model, decode_concurrency=1, prompt_concurrency=1, prompt_cache_size=0) as server:
        asked = server.ask(drawn(2000), 1000)
        until(lambda: server.report["sequences"]["running"] == 1)
        if stage == "waiting":
            other = server.ask(drawn(100))
            until(lambda: server.report["sequences"]["waiting"] == 1)
            other.client.left = True
            until(lambda: server.report["requests"]["left"] == 1)
            assert server.report["requests"]["finished"] == 0
        elif stage == "replying":
            until(lambda: asked.reply)
        asked.client.left = True
        until(lambda: idle(server) and server.report["bytes"] == 0)
        assert server.report["requests"]["left"] == 1 + (stage == "waiting")
        prompt = drawn(10)
        assert server.ask(prompt).wait().reply == server.alone(prompt)


def test_random_leavers_leave_nothing_behind(model: nn.Module) -> None:
    rng = random.Random(1)
    with serving(model, prompt_cache_size=0, decode_concurrency=4) as server:
        asked = []
        for _ in range(40):
            asked.append(server.ask(drawn(rng.randrange(1, 400)), rng.randrange(1, 60)))
            time.sleep(rng.random() * 0.03)
            if rng.random() < 0.7:
                rng.choice(asked).client.left = True
        stayed = [one for one in asked if not one.client.left]
        for one in stayed:
            assert len(one.wait().reply) == one.tokens
        for one in asked:
            one.client.put(ClientLeftError("gone"))  # as its thread finds out itself
            one.wait()
        until(lambda: idle(server) and server.report["bytes"] == 0)
        assert server.report["tokens"] == 0
        done = server.report["requests"]
        assert done["finished"] + done["left"] == 40 and done["failed"] == 0


# Bytes.


def test_what_does_not_fit_waits_and_what_never_fits_is_refused(model: nn.Module) -> None:
    with serving(model) as server:
        one = server.generator.served.most(408)
    with serving(model, limit=3 * one + one // 2, prompt_cache_size=4) as server:
        refused = server.ask(drawn(4000), 90).wait().refused
        assert isinstance(refused, MemoryLimitError) and "--kv-memory" in str(refused)
        seen = []
        prompts = [drawn(400) for _ in range(12)]
        asked = [server.ask(prompt) for prompt in prompts]
        while any(one.thread.is_alive() for one in asked):
            seen.append(server.report)
            time.sleep(0.005)
        for prompt, one in zip(prompts, asked, strict=True):
            assert one.wait().reply == server.alone(prompt)
        until(lambda: idle(server))
        assert all(x["bytes"] <= x["limit"] for x in [*seen, server.report])
        assert max(x["sequences"]["running"] for x in seen) <= 3
        assert 0 < server.report["sequences"]["stored"] <= 3  # the oldest made room


def test_a_request_that_fits_alone_runs_although_its_prefix_is_stored(model: nn.Module) -> None:
    prompt = drawn(700)
    with serving(model) as server:
        exactly = server.generator.served.most(708)
    with serving(model, limit=exactly) as server:
        for _ in range(3):
            asked = server.ask(prompt).wait()
            assert asked.reply == server.alone(prompt)
        assert server.report["bytes"] <= exactly


# Prompts that begin alike.


def test_a_document_is_read_once_for_all_who_ask_about_it_at_once(model: nn.Module) -> None:
    document = drawn(1500)
    prompts = [[*document, *drawn(12)] for _ in range(16)]
    with serving(model) as server:
        one = server.ask(prompts[0], 2).wait()
        until(lambda: idle(server))
        alone = server.report["bytes"]
        assert one.context.prompt_cache_count == 0
    with serving(model, prompt_cache_size=40) as server:
        asked = [server.ask(prompt, 40) for prompt in prompts]
        peak = 0
        while any(one.thread.is_alive() for one in asked):
            peak = max(peak, server.report.get("bytes", 0))
            time.sleep(0.005)
        reused = sorted(one.wait().context.prompt_cache_count for one in asked)
        assert reused[0] == 0 and reused[1] >= len(document) - 64
        until(lambda: idle(server))
        assert server.report["read_tokens"] < 1512 + 15 * 80
        assert server.report["hits"] == 15
        assert server.report["shared_bytes"] > 10 * alone
        assert peak > 0


def test_a_reader_that_leaves_is_followed_by_the_next(model: nn.Module) -> None:
    document = drawn(600)
    with serving(model, prefill_step_size=32) as server:
        first = server.ask([*document, 1])
        until(lambda: server.report["sequences"]["running"] == 1)
        others = [server.ask([*document, *drawn(5)]) for _ in range(3)]
        time.sleep(0.05)
        first.client.left = True
        for one in others:
            assert len(one.wait().reply) == 8
        until(lambda: idle(server))


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss", "qwen3_next"])
def test_models_whose_caches_are_not_all_ours(kind: str) -> None:
    model = TINY[kind](dtype=mx.float32)
    document = drawn(300)
    prompts = [[*document, *drawn(9)] for _ in range(4)] + [drawn(n) for n in (1, 33, 140)]
    with serving(model) as server:
        asked = [server.ask(prompt) for prompt in prompts]
        reused = [one.wait().context.prompt_cache_count for one in asked]
        assert [one.error or one.refused for one in asked] == [None] * 7
        assert sorted(reused[:4])[1] >= 300 - 64 and reused[4:] == [0] * 3
        for prompt, one in zip(prompts[4:], asked[4:], strict=True):
            assert one.reply == server.alone(prompt)
        until(lambda: idle(server))
        leaves = server.ask(drawn(20), 2000)
        until(lambda: leaves.reply)
        leaves.client.left = True
        until(lambda: idle(server))


# The parts.


def test_a_connection_that_was_closed_has_left() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    client = Client(ours)
    client.put(1)
    answers = client.answers(lambda: True)
    assert next(answers) == 1
    theirs.sendall(b"more")  # what is sent is no end
    Timer(0.6, lambda: client.put(2)).start()
    assert next(answers) == 2
    ours.recv(4)
    theirs.close()
    with pytest.raises(ClientLeftError):
        next(answers)
    assert client.left
    client.put(3)
    client.strict = True
    with pytest.raises(ClientLeftError):
        client.put(4)
    client.put(ValueError())
    with pytest.raises(RuntimeError, match="died"):
        list(Client().answers(lambda: False))


def test_a_line_a_minute_while_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    found = report.Report(facts={"limit": 8_000_000_000}, _line_at=1000.0)
    store = PromptStore()
    store.hits, store.misses = 3, 4
    found.look(Held(12, 40_960, 120_000_000, 480_000_000, 60_000_000), 9, 3, store)
    assert found.line() is None
    clock[0] += 61
    assert found.line() == (
        "leankv: 9 sequences run, 3 wait, 0 stored; 40,960 tokens, KV 120.0 MB of 8,000 MB "
        "(fp16 480.0 MB, shared 60.0 MB), 3 of 7 prompts began as one before"
    )
    assert found.line() is None
    clock[0] += 61
    found.look(Held(), 0, 0, store)
    assert found.line() is None


def test_rest_of() -> None:
    segments, types = [[1, 2, 3], [4, 5], [6]], ["system", "user", "assistant"]
    assert rest_of(segments, types, 0) == (segments, types)
    assert rest_of(segments, types, 2) == ([[3], [4, 5], [6]], types)
    assert rest_of(segments, types, 3) == ([[4, 5], [6]], types[1:])
    assert rest_of(segments, types, 5) == ([[6]], ["assistant"])


def test_a_guarded_function_fails_once() -> None:
    calls = [0]

    def fail(x: mx.array) -> mx.array:
        calls[0] += 1
        raise ValueError("no")

    guarded = Guarded(fail, lambda x: x)
    for _ in range(3):
        assert guarded(mx.array([1.0])).tolist() == [1.0]
    assert calls == [1] and isinstance(guarded.error, ValueError)
