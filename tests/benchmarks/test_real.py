"""A real model's benchmark, on the demo model and beside a peer that only speaks the protocol."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from leankv_mlx.benchmarks import real
from leankv_mlx.benchmarks.peer import client, worker
from leankv_mlx.benchmarks.peer.client import BITS, Peer, Run
from leankv_mlx.benchmarks.real import RealSettings, run_real
from leankv_mlx.cli.app import run
from leankv_mlx.errors import PeerError, UsageError
from leankv_mlx.evaluation.fidelity import Chunk
from leankv_mlx.mlx_lm import load

FAKE = Path(__file__).with_name("fake_peer.py")
GGUF = Path(sys.prefix) / "models" / "smollm2-135m-instruct.gguf"
OUR_ROWS = [("leankv", "none"), ("leankv", "k4v4")]
PEER_ROWS = [("ik_llama.cpp", cache) for cache in BITS]


@pytest.fixture
def behaving(tmp_path: Path) -> Callable[..., Path]:
    """A "model file" that tells the fake peer how to behave."""

    def write(**behaviour: str) -> Path:
        file = tmp_path / "model.gguf"
        file.write_text("".join(f"{name} = {how}\n" for name, how in behaviour.items()))
        return file

    return write


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Peer` runs the fake worker."""

    def opened(file: Path, threads: int, python: str | None) -> Peer:
        return Peer(file, threads, python, FAKE)

    monkeypatch.setattr(real, "Peer", opened)


def arguments(*more: str) -> list[str]:
    return ["bench", "--kv", "k4v4", "--tokens", "160", "--context", "256", "--chunks", "1",
            "--rounds", "2", *more]  # fmt: skip


def test_both_take_turns_on_the_same_tokens(
    behaving: Callable[..., Path], fake: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def watched(name: str, runner: real.Runner) -> real.Runner:
        def call(prompt: list[int], steps: list[int]) -> Run:
            seen.append((name, tuple(prompt), tuple(steps)))
            return runner(prompt, steps)

        return call

    ours, theirs = real._ours, real._theirs
    monkeypatch.setattr(real, "_ours", lambda m, arm: watched(arm.kv, ours(m, arm)))
    monkeypatch.setattr(real, "_theirs", lambda p, cache: watched(cache, theirs(p, cache)))
    assert run(arguments("--model", str(load().path), "--peer", str(behaving()), "--json")) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document["peer"] == "ik_llama.cpp 9.9" and document["threads"] >= 1
    assert "Speed, demo_model" in captured.err and "Fidelity, demo_model" in captured.err

    warm, measured = seen[:5], seen[5:]
    assert {(len(prompt), len(steps)) for _, prompt, steps in warm} == {(64, 2)}
    names = ["none", "f16", "k4v4", "q8_0", "q4_0 hadamard"]
    assert [name for name, _, _ in measured] == [*names, *names[1:], names[0]]
    ((prompt, steps),) = {(prompt, steps) for _, prompt, steps in measured}
    assert (len(prompt), len(steps)) == (160, real.STEPS)

    speed = {(row["program"], row["cache"]): row for row in document["speed"]}
    assert {*speed} == {*OUR_ROWS, *PEER_ROWS}
    f16, k4v4 = speed["ik_llama.cpp", "f16"], speed["leankv", "k4v4"]
    assert f16["prefill_tokens_s"] == pytest.approx(1000)
    assert f16["decode_tokens_s"] == pytest.approx(10) and f16["kv_bytes"] == 19200
    assert f16["prefill_speedup"] == f16["decode_speedup"] == 1 and f16["rounds"] == 2
    assert k4v4["reference"] == "ik_llama.cpp f16" and k4v4["prefill_tokens_s"] > 0
    assert 0 < k4v4["kv_bytes"] < speed["leankv", "none"]["kv_bytes"]

    loss = {(row["program"], row["cache"]): row for row in document["fidelity"]}
    assert {*loss} == {*OUR_ROWS, *PEER_ROWS}
    assert [loss[row]["kld"]["mean"] for row in PEER_ROWS] == [0, 1, 2]
    assert all(row["tokens"] == 128 for row in loss.values())
    assert loss["leankv", "none"]["kld"]["mean"] == 0 < loss["leankv", "k4v4"]["kld"]["mean"] < 0.1
    assert loss["leankv", "k4v4"]["body_bits"] == 4.25


def test_without_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments("--model", str(load().path), "--json")) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["peer"] is None
    assert [(row["program"], row["cache"]) for row in document["speed"]] == OUR_ROWS
    assert {row["reference"] for row in document["speed"]} == {"leankv none"}


def test_a_slow_cache_is_not_run_again() -> None:
    calls: list[str] = []

    def runner(name: str, seconds: float) -> real.Runner:
        def call(prompt: list[int], steps: list[int]) -> Run:
            calls.append(name)
            return Run(seconds, seconds, 1)

        return call

    slow, fast = real._Cache("leankv", "none"), real._Cache("leankv", "k4v4")
    runners = {slow: runner("slow", 1000.0), fast: runner("fast", 1.0)}
    found = real._rounds(runners, [1], [1], 3, lambda name: None)
    assert calls == ["slow", "fast", "fast", "fast"]
    rows = real._speed_rows(10, found)
    assert [row["rounds"] for row in rows] == [1, 3]
    assert rows[1]["prefill_speedup"] == 1000


def test_a_context_is_cut_to_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    monkeypatch.setattr(real, "context_length", lambda config: 232)
    settings = RealSettings(kv=("k8v8",), tokens=(200, 512, 4096), rounds=1)
    rows = real._speed(settings, loaded, None, None, lambda what: None)
    assert [row["tokens"] for row in rows] == [200, 200]  # 232 has room for 200 and the steps


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"open": "missing"}, "pip install ik-llama-cpp-python"),
        ({"open": "fail"}, "ik_llama.cpp failed: RuntimeError: no room."),
        ({"open": "exit"}, "ended with exit code 3"),
        ({"run": "crash"}, "ended by signal 6 (fa.h:12: GGML_ASSERT(S > 0) failed)"),
        ({"run": "babble"}, "'Hello.', which is no reply"),
        ({"score": "crash"}, "ended by signal 6"),
    ],
)
def test_a_peer_that_fails_is_one_line(
    behaviour: dict[str, str], message: str, behaving: Callable[..., Path], fake: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = behaving(**behaviour)
    assert run(arguments("--model", str(load().path), "--peer", str(file))) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


def test_a_peer_that_hangs_is_ended(behaving: Callable[..., Path]) -> None:
    with Peer(behaving(run="hang"), 1, worker=FAKE, patience=0.003) as peer:
        begin = time.monotonic()
        with pytest.raises(PeerError, match="has not answered for"):
            peer.run("f16", [1], [2])
        assert time.monotonic() - begin < 20
        assert peer._process.wait(5) is not None
        with pytest.raises(PeerError, match="ended by signal"):
            peer.run("f16", [1], [2])


def test_the_process_ends_with_the_block(behaving: Callable[..., Path]) -> None:
    with Peer(behaving(), 1, worker=FAKE) as peer:
        assert peer.run("q8_0", [1, 2], [3]) == Run(0.002, 0.1, 300)
        assert peer._process.poll() is None
    assert peer._process.poll() is not None


def test_an_interpreter_that_is_not_there(
    behaving: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(client.ENVIRONMENT, "/no/such/python")
    assert run(arguments("--peer", str(behaving()))) == 1
    error = capsys.readouterr().err
    assert "cannot start /no/such/python" in error and error.strip().count("\n") == 0


def test_the_worker_says_that_the_package_is_missing(tmp_path: Path) -> None:
    """The script itself, by an interpreter that has nothing installed."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(PeerError, match=f"not installed for {bare}: pip install"):
        Peer(tmp_path / "model.gguf", 1, str(bare))


def test_both_sides_name_the_same_caches() -> None:
    assert list(worker.CACHES) == list(BITS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peer", "no-such.gguf"], "--peer no-such.gguf"),
        (["--model", "demo", "--rounds", "0"], "--rounds 0"),
        (["--model", "demo", "--tokens", "64"], "at least 128"),
        (["--model", "demo", "--kv", "k5v5"], "k_bits=5"),
        (["--model", "demo", "--text", "no-such-text"], "cannot read no-such-text"),
    ],
)
def test_bad_usage_is_one_line(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(*more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


def test_a_text_that_is_too_short_is_told(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text.")
    with pytest.raises(UsageError, match="give a longer text"):
        run_real(RealSettings(text=text, tokens=(160,), context=256, chunks=1))


@pytest.mark.real
def test_the_peer_itself() -> None:
    """Fewer bits take less and cost more, and its own cache is the base."""
    if not GGUF.is_file():
        pytest.skip("make real-models fetches the model")
    ids = mx.random.randint(100, 20000, (257,), key=mx.random.key(0))
    try:
        peer = Peer(GGUF, 2, os.environ.get(client.ENVIRONMENT))
    except PeerError as error:
        pytest.skip(str(error))
    with peer:
        runs = [peer.run(cache, list(range(100, 164)), [5, 6]) for cache in BITS]
        scores = peer.score(Chunk(ids[:-1], ids[1:]))
    assert all(one.prefill_s > 0 and one.decode_s > 0 for one in runs)
    elements = 66 * 30 * 3 * 64 * 2  # tokens, layers, heads, head_dim, keys and values
    bits = [8 * one.kv_bytes / elements for one in runs]
    assert bits == pytest.approx([*BITS.values()], rel=0.01)  # and the positions
    klds = [scores[cache].kl.mean() for cache in BITS]
    assert klds[0] == 0 < klds[1] < klds[2]
    assert all(len(one.kl) == 128 for one in scores.values())
