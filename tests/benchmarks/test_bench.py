"""`leankv bench` with settings that take no time."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from leankv_mlx.benchmarks import settings as presets
from leankv_mlx.benchmarks.attention import products
from leankv_mlx.benchmarks.documents import measure_documents
from leankv_mlx.benchmarks.masks import RATIOS
from leankv_mlx.benchmarks.settings import FULL, PARTS, Settings
from leankv_mlx.benchmarks.shapes import SHAPES, Heads, Shape, shape_of
from leankv_mlx.benchmarks.skip import SKIPS
from leankv_mlx.benchmarks.timing import Budget
from leankv_mlx.cli.app import run
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.kernels import available_backends, resolve_backend

TINY = replace(
    FULL,
    attention=(160,),
    steps=(160,),
    prefill=(160,),
    encode=(160,),
    skip=(160,),
    masks=(160,),
    policy=(600,),
    projections=("tiny",),
    heads=(Heads(4, 2, 64),),
    shape="tiny",
    prefill_rounds=1,
    policy_rounds=1,
    budget=Budget(seconds=0.01, warm_up=0.0, fewest=1, most=3),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", "qwen3", 2, 64, 96, 4, 2, 64, 128))
    monkeypatch.setattr(presets, "FAST", TINY)
    return TINY


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["bench", "--fast", "--json", *arguments]) == 0
    captured = capsys.readouterr()
    assert "the fastest of the others over ours" in captured.err or "attention" not in arguments
    document: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return document


def test_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    document = measured(capsys)
    assert list(document) == ["machine", "backend", *PARTS]
    assert document["backend"] == resolve_backend().name
    shared = {"tokens", "format", "ms", "baseline_ms", "speedup"}
    for part in [part for part in PARTS if part not in ("policy", "projections")]:
        assert document[part]
        for row in document[part]:
            of_heads = part in ("attention", "masks")
            own = {"query_heads", "kv_heads", "head_dim"} if of_heads else {"shape"}
            assert shared | own <= set(row)
            assert row["tokens"] == 160 and row["ms"] > 0
            assert row["speedup"] == pytest.approx(min(row["baseline_ms"].values()) / row["ms"])
            assert all(ratio > 0 for ratio in row["ratios"].values())
    stock = {"fp32", "bf16", "fp16", "kv_bits_8", "kv_bits_4"}
    assert [row["format"] for row in document["attention"]] == ["k4v4", "k3v2"]
    assert all(set(row["baseline_ms"]) == stock for row in document["attention"])
    assert [row["dtype"] for row in document["steps"]] == ["bf16", "fp32"]
    for row in document["steps"]:
        assert set(row["baseline_ms"]) == stock
        assert row["kv_bytes"] < row["baseline_kv_bytes"][row["dtype"]]
    for row in document["prefill"]:
        assert list(row["baseline_ms"]) == [row["dtype"]]
    uniform = [row for row in document["skip"] if row["data"] == "uniform"]
    assert len(document["skip"]) == 2 * len(uniform) == 2 * len(SKIPS)
    assert all(row["read"] == 1 and row["error"] < 1e-3 for row in uniform)
    for row in document["skip"]:
        assert 0 < row["read"] <= 1 and list(row["baseline_ms"]) == ["no skip"]
    assert [row["ratio"] for row in document["masks"]] == list(RATIOS)
    for row in document["masks"]:
        assert row["k_bytes"] == pytest.approx(1 - row["ratio"], abs=0.5 / 32)  # 8 x 2 x 2 groups
        assert row["v_bytes"] == pytest.approx(1 - row["empty_heads"]) and row["empty_heads"] > 0
        assert row["k_bytes"] < row["bytes"] < row["v_bytes"]
        assert list(row["baseline_ms"]) == ["whole keys"]
    assert len(document["policy"]) == 2
    for row in document["policy"]:
        assert row["prompt_share"] == pytest.approx(row["end_ms"] / row["prompt_ms"])
        assert 0 < row["decode_share"] < 1 < row["ratio"]
    for row in document["encode"]:
        assert row["share"] == pytest.approx(row["ms"] / row["baseline_ms"]["step"], rel=1e-6)


def test_projections(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(capsys, "--only", "projections")["projections"]
    assert [(row["part"], row["rows"], row["share"]) for row in rows] == [
        ("2 layers", 1, 1.0), ("2 layers", 1, 0.75), ("2 layers", 1, 0.5), ("2 layers", 4, 1.0),
        ("1 layers", 512, 1.0), ("head", 1, 1.0),
    ]  # fmt: skip
    weights = 2 * (64 * 4 * 64 + 2 * 64 * 2 * 64 + 4 * 64 * 64 + 3 * 64 * 96)
    for row in rows:
        assert row["ms"] > 0 and set(row["baseline_ms"]) == {"mlx", "dense fp32"}
        assert row["speedup"] == pytest.approx(min(row["baseline_ms"].values()) / row["ms"])
        assert ("bound_share" in row) == (row["backend"] == "cpu")
    assert [row["products"] for row in rows] == [
        weights, weights, weights, 4 * weights, 256 * weights, 64 * 128,
    ]  # fmt: skip


def test_choices(capsys: pytest.CaptureFixture[str]) -> None:
    document = measured(
        capsys, "--only", "attention", "--kv", "k8v4", "--kv", "leankv", "--tokens", "128,192",
        "--heads", "6x3x32", "--backend", "reference",
    )  # fmt: skip
    assert document["backend"] == "reference"
    assert document["steps"] == document["prefill"] == document["encode"] == []
    assert document["skip"] == document["masks"] == document["policy"] == []
    rows = document["attention"]
    assert [(row["tokens"], row["format"]) for row in rows] == [
        (128, "k8v4"), (128, "k4v4"), (192, "k8v4"), (192, "k4v4"),
    ]  # fmt: skip
    for row in rows:
        assert (row["query_heads"], row["kv_heads"], row["head_dim"]) == (6, 3, 32)
        assert set(row["baseline_ms"]) == {"fp32", "bf16", "fp16"}  # mlx quantizes 64 channels
        assert "bound_share" not in row


def test_steps_that_leave_out_channels(capsys: pytest.CaptureFixture[str]) -> None:
    """On random weights of 4 bits, whatever is attached after them."""
    document = measured(
        capsys, "--only", "steps", "--only", "encode", "--kv", "k4v4,sparse=0.5", "--kv", "k4v4"
    )
    rows = {(row["format"], row["dtype"]): row for row in document["steps"]}
    assert rows["k4v4", "fp32"]["weights_read"] == 1
    assert 0.2 < rows["k4v4,sparse=0.5", "fp32"]["weights_read"] < 0.8
    assert document["encode"]


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no native extension")
def test_the_native_backend_is_held_against_the_processor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from leankv_mlx.kernels.cpu import load

    threads = load().threads()
    (row,) = measured(capsys, "--only", "attention", "--kv", "k4v4", "--backend", "cpu")[
        "attention"
    ]
    for name in ("bound_share", "one_thread_ms", "thread_speedup", "bound_thread_speedup"):
        assert row[name] > 0
    assert load().threads() == threads
    assert load().multiply_add_rate(1_000_000) > 1e6


def test_products_of_a_format() -> None:
    heads = Heads(8, 2, 64)
    assert products(heads, 100, CompressionConfig()) == 100 * 8 * 128
    some = CompressionConfig(k_bits=(4, 0))
    assert products(heads, 100, some) == 100 * 8 * 96


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--fast", "--only", "steps", "--only", "encode"]) == 0
    out = capsys.readouterr().out
    assert "Decode steps, tiny" in out and "Encoding, tiny" in out and "same dtype" in out


def test_shapes() -> None:
    whole, cut = shape_of("qwen3-0.6b"), shape_of("Qwen3-0.6B-8l")
    assert whole.layers == 28 and 0.55e9 < whole.parameters < 0.65e9
    assert (cut.layers, cut.hidden, cut.query_heads, cut.kv_heads, cut.head_dim) == (
        8, 1024, 16, 8, 128,
    )  # fmt: skip
    assert cut.parameters == pytest.approx(whole.parameters * 8 / 28, rel=0.01)
    assert cut.with_layers(2).name == "qwen3-0.6b-2l"
    with pytest.raises(UsageError, match="unknown shape"):
        shape_of("qwen3-0.6b-99l")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "speed"], 2, "--only speed"),
        (["--tokens", "many"], 2, "--tokens many"),
        (["--tokens", "64"], 2, "at least 128"),
        (["--heads", "32x8"], 2, "--heads 32x8"),
        (["--heads", "32x5x128"], 2, "multiple of KV heads"),
        (["--shape", "gpt-9"], 2, "unknown shape gpt-9"),
        (["--kv", "k5v5"], 2, "k_bits=5"),
        (["--kv", "none"], 2, "always measured"),
        (["--backend", "abacus"], 1, "unknown backend 'abacus'"),
        (["--backend", "metal"], 1, "Metal"),
        (["--only", "steps", "--tokens", "99999999"], 2, "smaller --tokens"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[-1] == "metal" and available_backends()["metal"] is None:
        pytest.skip("Metal is here")
    assert run(["bench", "--fast", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


def test_documents_are_opened_and_answered_alike() -> None:
    found = measure_documents(tokens=600, rounds=1)
    assert found["same_answers"] is True
    assert 500 < found["document_tokens"] < 600
    assert found["speedup"] > 1
    assert found["file_bytes"] == pytest.approx(found["resident_bytes"], rel=0.05)
