"""One model on several machines, which are two processes here: `mlx.launch` and MLX's ring."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from leankv_mlx import attach
from leankv_mlx.cache import BatchedKVCache, CompressedKVCache
from leankv_mlx.errors import ModelError, UnsupportedError
from leankv_mlx.mlx_lm import attachment, load
from leankv_mlx.mlx_lm.group import machines_of, place
from leankv_mlx.resources import demo_model
from tests.mlx_lm.commands import LONG, SUMMARY, hooked_environment, run, script, server
from tests.models import TINY

PART = Path(__file__).with_name("part.py")
BUDGET = "leankv:policy=budget,ratio=4,window=32,budget=2MB"
LAYERS = "leankv:layer_bits=k8v8/k4v4/k4v4/k3v2/k2v2"
SPLITS = ["heads", "layers"]
"""How mlx-lm splits a model: tensor-parallel, or in a pipeline."""
REPLY = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32, as a kind that mlx-lm splits by heads and by layers: qwen2 is
    llama with biases of queries, keys and values."""
    made = tmp_path_factory.mktemp("machines") / "qwen2"
    shutil.copytree(demo_model(), made, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((demo_model() / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (made / "config.json").write_text(json.dumps(config))
    loaded: Any = mx.load(str(demo_model() / "model.safetensors"))
    weights = {name: array.astype(mx.float32) for name, array in loaded.items()}
    for name, array in list(weights.items()):
        if re.search(r"self_attn\.[qkv]_proj", name):
            weights[name.replace(".weight", ".bias")] = mx.zeros(array.shape[0])
    file = "model.safetensors"
    mx.save_safetensors(str(made / file), weights, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (made / f"{file}.index.json").write_text(json.dumps(index))
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hooked_environment(
        tmp_path_factory.mktemp("hook"), OPENBLAS_NUM_THREADS="1", LEANKV_THREADS="1"
    )


def launch() -> list[str]:
    """`mlx.launch` for two processes, on ports that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        return [script("mlx.launch"), "-n", "2", "--starting-port", str(port), "--"]


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command and all that it starts; they end with the block. Its input stays open, because
    `mlx.launch` looks for some all the time."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        command, env=environment, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def output(command: list[str], environment: dict[str, str], text: str = "") -> tuple[str, str]:
    """What a command of several machines says; all of them have to end well."""
    with started(command, environment) as process:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.flush()
        process.wait(120)
        assert process.stdout is not None and process.stderr is not None
        out, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0 and "exited with code" not in errors, errors
    return out, errors


def replies(
    folder: Path, split: str, environment: dict[str, str], results: Path, *kv: str
) -> list[dict[str, Any]]:
    """What each machine saw with each setting."""
    prompt = json.dumps(load(folder).tokenizer.encode(LONG))
    command = [sys.executable, str(PART), str(folder), split, prompt, str(REPLY), str(results), *kv]
    if split == "whole":
        output(command, environment)
    else:
        output([*launch(), *command], environment)
    return [json.loads(file.read_text()) for file in sorted(results.parent.glob("*.[0-9]"))]


@pytest.fixture(scope="module")
def alone(
    folder: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one machine that has the whole model sees."""
    results = tmp_path_factory.mktemp("alone") / "whole"
    return replies(folder, "whole", environment, results, "leankv", LAYERS, BUDGET)[0]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_machines_reply_as_one_and_share_its_bytes(
    split: str, folder: Path, environment: dict[str, str], alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = replies(folder, split, environment, tmp_path / split, "leankv", LAYERS, BUDGET)
    assert alone["leankv"]["machines"] == 1
    for kv in ("leankv", LAYERS, BUDGET):
        one, parts = alone[kv], (first[kv], second[kv])
        assert len(one["reply"]) == REPLY
        assert first[kv]["reply"] == second[kv]["reply"]
        assert first[kv]["all"] == second[kv]["all"]
        for part in parts:
            assert part["machines"] == 2 and part["own"]["tokens"] == one["own"]["tokens"]
            assert all(row["compressed"] and row["attention"] == "fused" for row in part["layers"])
            limited = "each of 2 machines" in part["layers"][0]["reason"]
            assert limited == (kv == BUDGET)
        for key in ("used", "fp16"):
            assert sum(part["own"][key] for part in parts) == first[kv]["all"][key]
        if split == "heads":
            assert len(first[kv]["layers"]) == 5
            assert first[kv]["own"]["fp16"] == second[kv]["own"]["fp16"] == one["own"]["fp16"] / 2
        else:  # the first machine has the last layers
            assert [len(part["layers"]) for part in parts] == [3, 2]
            assert second[kv]["bits"] + first[kv]["bits"] == one["bits"]
    for kv in ("leankv", LAYERS):
        assert first[kv]["reply"] == alone[kv]["reply"]
        assert first[kv]["all"]["used"] == pytest.approx(alone[kv]["own"]["used"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_a_chat_tells_the_bytes_of_all(
    split: str, folder: Path, environment: dict[str, str]
) -> None:
    """Each machine reads the same input, and one of them speaks for all."""
    chat = [script("mlx_lm.chat"), "--model", str(folder), "--max-tokens", "24", "--kv", BUDGET]
    text = f"{LONG}\nAnd then?\nq\n"
    one = run(chat, environment, text)
    _, errors = output(
        [*launch(), *chat, *(["--pipeline"] if split == "layers" else [])], environment, text
    )
    (line,) = re.findall("leankv: .*\n", errors)
    assert line.endswith(", 2 machines with a budget each\n")
    told = SUMMARY.search(line.replace(", 2 machines with a budget each", ""))
    alone = SUMMARY.search(one.stderr)
    assert told and alone and told[1] == alone[1]  # as many tokens: the replies were as long
    assert float(told[2]) == pytest.approx(float(alone[2]), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_a_server_answers_alone_and_together(
    split: str, folder: Path, environment: dict[str, str]
) -> None:
    questions = [LONG, "a fox", "Once upon a time", f"What is in this? {LONG}"]
    command = [script("mlx_lm.server"), "--model", str(folder), "--kv", "leankv"]
    with server(command, environment) as address:
        expected = [ask(address, question) for question in questions]
        alone = report(address, len(questions))
    several = [*launch(), *command, *(["--pipeline"] if split == "layers" else [])]
    with server(several, environment) as address:
        assert ask(address, questions[0]) == expected[0]
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(lambda question: ask(address, question), questions))
        told = report(address, 1 + len(questions))
    assert found == expected
    assert told["machines"] == 2 and told["bytes"] <= told["limit"]
    for name in ("bytes", "fp16_bytes"):  # one more prompt is kept, or began as another
        assert 0.8 * alone[name] < told[name] < 1.5 * alone[name]


def report(address: str, requests: int) -> dict[str, Any]:
    """What the server says that it holds, once it has looked after so many requests."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{address}/v1/kv", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
        if found["hits"] + found["misses"] == requests and not found["sequences"]["running"]:
            return found
        time.sleep(0.1)
    raise TimeoutError("the server did not look at what it holds")


def ask(address: str, question: str) -> str:
    """The reply of a server."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        reply: str = json.load(response)["choices"][0]["message"]["content"]
    assert reply
    return reply


def test_what_a_stage_computed_is_sent_when_it_is_tied_to_a_cache() -> None:
    """Reading a prompt evaluates no more of a stage than its caches."""
    for cache in (CompressedKVCache(), BatchedKVCache([CompressedKVCache()])):
        before = mx.get_active_memory()
        made = mx.arange(1 << 20)
        cache.keys = mx.depends(cache.keys, made)
        mx.synchronize()
        assert mx.get_active_memory() >= before + made.nbytes
        del made


def test_a_model_that_is_split_leaves_out_no_channels() -> None:
    model = TINY["qwen3_next"]()
    model.model.pipeline_size = 2
    assert machines_of(model) == 2
    with pytest.raises(UnsupportedError, match="whole model"):
        attach(model, "leankv:sparse=0.5")


def test_a_whole_model_has_no_machines_to_ask() -> None:
    model = TINY["llama"]()
    assert machines_of(model) == 1
    assert place(model, 3) == (0, 3)


def test_heads_that_cannot_be_split_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm splits three heads for two machines as if they were even."""
    model: Any = TINY["llama"]()
    monkeypatch.setattr(attachment, "machines_of", lambda model: 2)
    attach(model)
    for layer in model.layers:
        layer.self_attn.n_kv_heads = 1  # of two, whose keys are all there
    with pytest.raises(ModelError, match="heads cannot be split over 2 machines"):
        attach(model)
