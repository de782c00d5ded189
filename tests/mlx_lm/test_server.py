"""`leankv serve` and `mlx_lm.server --kv` over HTTP, as clients of all kinds meet them."""

from __future__ import annotations

import json
import random
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leankv_mlx.evaluation import prose
from tests.mlx_lm.commands import MODEL, hooked_environment, script, server

openai = pytest.importorskip("openai")

SERVE = [sys.executable, "-m", "leankv_mlx.cli", "serve"]
DOCUMENT = prose.text(random.Random(1), 9000)


@pytest.fixture(scope="module")
def plain(env: dict[str, str]) -> Iterator[str]:
    """A server that keeps no prompts: what it holds is what runs."""
    flags = ["--prompt-cache-size", "0", "--prefill-step-size", "256"]
    with server([*SERVE, *flags], env) as address:
        yield address


@pytest.fixture(scope="module")
def client(plain: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{plain}/v1", api_key="none", timeout=300, max_retries=0) as found:
        yield found


def state(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/v1/kv", timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_idle(address: str) -> bool:
    found = state(address)["sequences"]
    return found["running"] == found["waiting"] == 0


def post(address: str, body: Any, path: str = "/v1/completions") -> tuple[int, str]:
    """Status and content."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"{address}{path}", data, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def streamed(client: Any, prompt: str, tokens: int) -> str:
    stream = client.completions.create(
        model="default_model", prompt=prompt, max_tokens=tokens, temperature=0, stream=True
    )
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


# Replies.


def check_many(client: Any, plain: str, count: int) -> None:
    rng = random.Random(count)
    asked = [
        (prose.text(random.Random(i), rng.randrange(5, 900)), rng.randrange(1, 16))
        for i in range(count)
    ]
    alone = [streamed(client, *one) for one in asked]
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(lambda one: streamed(client, *one), asked))
    assert together == alone
    until(lambda: is_idle(plain))
    assert state(plain)["bytes"] == 0


def test_streams_at_once_get_what_each_gets_alone(client: Any, plain: str) -> None:
    check_many(client, plain, 8)


@pytest.mark.slow
def test_50_streams_at_once_get_what_each_gets_alone(client: Any, plain: str) -> None:
    check_many(client, plain, 50)


def test_the_list_of_models_and_the_state(client: Any, plain: str) -> None:
    assert [model.id for model in client.models.list()][-1] == MODEL
    found = state(plain)
    assert found["setting"] == "leankv:k4v4" and found["layers"] == {"compressed": 5, "all": 5}
    assert set(found) >= {
        "sequences", "tokens", "bytes", "fp16_bytes", "shared_bytes", "limit", "hits", "misses",
        "reused_tokens", "read_tokens", "generated_tokens", "requests", "backend", "model",
    }  # fmt: skip


# What clients send.


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "cannot be used"),
        (b"[" * 100_000, 400, ""),
        (b"[]", 400, "dictionary"),
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": 5}, 400, "cannot be used"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "stop": [5]}, 400, "stop must be"),
        ({"prompt": "x", "stream_options": []}, 400, "stream_options"),
        ({"prompt": "x", "logit_bias": {"4096": 1}}, 400, "token 4096"),
        ({"prompt": "x", "logit_bias": {"1": None}}, 400, "cannot be used"),
        ({"prompt": "x", "top_k": 5000, "temperature": 1}, 400, "top_k"),
        ({"prompt": "x", "seed": 1, "top_k": 5000, "temperature": 1}, 400, "top_k"),
        ({"prompt": "x " * 20_000}, 400, "the model's context 8192"),
        ({"prompt": "x", "model": "/no/model"}, 404, "no model folder /no/model"),
    ],
)
def test_what_has_no_meaning_gets_one_line(plain: str, body: Any, status: int, text: str) -> None:
    found, content = post(plain, body)
    assert found == status
    error = json.loads(content)["error"]
    assert text in error and "\n" not in error and "errors.log" not in error


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
    ],
)
def test_what_is_no_request_gets_an_answer(plain: str, head: bytes) -> None:
    with _connection(plain) as connection:
        connection.sendall(head)
        assert connection.recv(1 << 16)
    assert post(plain, {"prompt": "x", "max_tokens": 1})[0] == 200


# Those who leave.


def _connection(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def check_leavers(plain: str, count: int) -> None:
    rng = random.Random(3)

    def leave(number: int) -> None:
        body = {
            "prompt": prose.text(random.Random(number), rng.randrange(10, 6000)),
            "max_tokens": 400,
            "stream": number % 2 == 0,
        }
        data = json.dumps(body).encode()
        with _connection(plain) as connection:
            sent = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            whole = sent + data
            connection.sendall(whole if number % 7 else whole[: len(whole) // 2])
            time.sleep(rng.random() * 0.4)
            if number % 3 == 0:  # a reset instead of an end
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    before = state(plain)["requests"]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(count)))
    # Some ask for so little that they are answered, and some never send their whole request.
    until(lambda: state(plain)["requests"]["left"] > before["left"] and is_idle(plain))
    time.sleep(1.5)
    until(lambda: is_idle(plain))
    found = state(plain)
    assert found["bytes"] == found["tokens"] == 0
    assert found["requests"]["failed"] == before["failed"] == 0
    assert post(plain, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_those_who_leave_free_their_bytes(plain: str) -> None:
    check_leavers(plain, 30)


@pytest.mark.slow
def test_200_who_leave_free_their_bytes(plain: str) -> None:
    check_leavers(plain, 200)


# Bytes, documents, and what is left after a restart.


def test_a_document_is_held_once_and_is_there_after_a_restart(
    env: dict[str, str], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    command = [
        script("mlx_lm.server"), "--kv", "leankv", "--model", MODEL, "--kv-memory", "5MB",
        "--kv-store", str(kept), "--kv-store-size", "50MB",
        "--prompt-cache-size", "40", "--max-tokens", "6",
    ]  # fmt: skip
    bodies = [{"prompt": f"{DOCUMENT} Question {i}: why?", "max_tokens": 30} for i in range(16)]
    log = tmp_path / "log"
    with server(command, env, log) as address:
        assert re.search(
            r"mlx_lm.server: demo_model, leankv:k4v4, 5.0 MB of KV: about \d+ sequences of 4,096 "
            r"tokens \(\d+ uncompressed\); http://127.0.0.1:\d+/v1",
            log.read_text(),
        )
        status, content = post(address, {"prompt": DOCUMENT, "max_tokens": 8000})
        assert status == 413 and "--kv-memory" in content and "5.0 MB" in content
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda body: json.loads(post(address, body)[1]), bodies))
        tokens = answers[0]["usage"]["prompt_tokens"]
        cached = sorted(x["usage"]["prompt_tokens_details"]["cached_tokens"] for x in answers)
        assert cached[0] == 0 and cached[1] > 0.95 * tokens
        until(lambda: is_idle(address))
        found = state(address)
        assert found["read_tokens"] < tokens + 15 * 80
        assert found["bytes"] <= 5_000_000 and found["shared_bytes"] > 3 * found["bytes"]
        until(lambda: [file for file in kept.glob("*") if file.stat().st_size > 100_000])
    with server(command, env) as address:  # the one before was killed
        usage = json.loads(post(address, bodies[0])[1])["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0.9 * tokens
        until(lambda: state(address)["hits"] == 1)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hooked_environment(tmp_path_factory.mktemp("hook"))
