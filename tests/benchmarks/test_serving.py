"""`leankv bench --serving` on the bundled model, with few short requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leankv_mlx.benchmarks import serving
from leankv_mlx.benchmarks.serving import ServingSettings, run_serving
from leankv_mlx.cli.app import run
from leankv_mlx.errors import UsageError


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    settings = ServingSettings(
        kv=("k4v4,window=32",), requests=3, tokens=256, generate=4, fits=1, rounds=2
    )
    return run_serving(settings).as_dict()


def test_batches_with_and_without_a_limit(document: dict[str, Any]) -> None:
    free, ours_free, limited, ours_limited = document["batches"]
    assert [row["cache"] for row in document["batches"]] == ["none", "k4v4,window=32"] * 2
    assert [row["at_a_time"] for row in (free, ours_free, limited)] == [3, 3, 1]
    assert free["limit_bytes"] is None is ours_free["limit_bytes"]
    limit = limited["limit_bytes"]
    token = 5 * 2 * (64 + 64) * 2  # layers, heads, elements, bytes
    assert limit == limited["kv_bytes"] == (256 + 4) * token
    assert ours_limited["limit_bytes"] == limit >= ours_limited["kv_bytes"]
    fitting = ours_limited["at_a_time"]
    assert 1 < fitting <= 3
    assert ours_limited["kv_bytes"] == pytest.approx(ours_free["kv_bytes"] * fitting / 3, rel=0.01)
    for row in document["batches"]:
        assert row["rounds"] == 2
        assert all(row[f"{part}_tokens_s"] > 0 for part in ("prefill", "decode", "total"))
    for base, ours in ((free, ours_free), (limited, ours_limited)):
        assert base["decode_speedup"] == base["prefill_speedup"] == base["total_speedup"] == 1
        assert ours["total_speedup"] == pytest.approx(
            ours["total_tokens_s"] / base["total_tokens_s"]
        )


def test_requests_on_one_document(document: dict[str, Any]) -> None:
    base, ours = document["document"]
    for row in (base, ours):
        assert row["document_tokens"] == 512 and row["requests"] == 3
        assert 0 < row["others_s"] < row["first_s"]
        assert row["others_share"] == row["others_s"] / row["first_s"]
    assert base["kv_ratio"] == 3  # nothing is shared
    assert 1 < ours["kv_ratio"] < 2
    assert ours["kv_bytes_one"] < base["kv_bytes_one"] / 2


def test_arms_differ_in_the_cache_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies begin from what was read once, with as many at a time as fit."""
    calls: list[tuple[str, int]] = []
    reply, read = serving._reply, serving._read

    def seen(model: Any, prompts: Any, caches: Any, tokens: int, together: int) -> Any:
        calls.append(("reply", together))
        assert [cache[0].offset for cache in caches] == [len(p) - 1 for p in prompts]
        return reply(model, prompts, caches, tokens, together)

    def counted(model: Any, prompts: Any) -> Any:
        calls.append(("read", len(prompts)))
        return read(model, prompts)

    monkeypatch.setattr(serving, "_reply", seen)
    monkeypatch.setattr(serving, "_read", counted)
    monkeypatch.setattr(serving, "READ_TOGETHER", 2)
    monkeypatch.setattr(serving, "measure_shared", lambda *args: [])
    run_serving(ServingSettings(kv=("k4v4,window=32",), requests=3, tokens=128, generate=2, fits=1))
    assert [n for kind, n in calls if kind == "read"] == [2, 2, 2, 2, 1, 1]  # the first ones warm
    rounds = [n for kind, n in calls if kind == "reply"]
    assert len(rounds) == 3 * 2 * 2
    assert rounds[:2] == rounds[4:6] == [3, 3] and sorted(rounds[2:4])[0] == 1


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--requests", "2", "--tokens", "128", "--generate", "3", "--fits", "1"]
    assert run(["bench", "--serving", "--fast", "--kv", "k4v4", *sizes, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert (found["requests"], found["tokens"], found["generate"]) == (2, 128, 3)
    assert len(found["batches"]) == 4 and len(found["document"]) == 2
    assert "2 requests of 128 tokens, 3 generated, demo_model" in captured.err
    assert "2 requests on 256 tokens" in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "64"], "at least 128"),
        (["--tokens", "256,512"], "one number"),
        (["--requests", "1"], "--requests 1"),
        (["--generate", "1"], "--generate 1"),
        (["--fits", "0"], "--fits 0"),
        (["--question", "1"], "--question 1"),
        (["--rounds", "0"], "--rounds 0"),
        (["--kv", "k5v5"], "k_bits=5"),
        (["--text", "no-such-text"], "cannot read no-such-text"),
    ],
)
def test_bad_usage_is_one_line(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--serving", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


def test_a_text_that_is_too_short_is_told(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A word and another. " * 60)
    with pytest.raises(UsageError, match="needed; give a longer text"):
        run_serving(ServingSettings(text=text, tokens=128))
