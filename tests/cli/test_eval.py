"""`leankv eval` as a command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from leankv_mlx.cli.app import run

SMALL = ["--kv", "k4v4", "--tasks", "s2", "--lengths", "200", "--samples", "1",
         "--context", "200", "--chunks", "1"]  # fmt: skip


def test_the_last_line_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", *SMALL, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert [arm["kv"] for arm in document["arms"]] == ["none", "k4v4"]
    assert document["model"] == "demo_model"
    assert list(document["arms"][1]["retrieval"]) == ["S2"]
    assert "Fidelity" in captured.err


def test_a_table_and_a_text_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The tower of the harbour is red. " * 60, encoding="utf-8")
    arguments = [
        "--kv",
        "k8v8",
        "--tasks",
        "none",
        "--context",
        "200",
        "--chunks",
        "1",
        "--text",
        str(text),
    ]
    assert run(["eval", *arguments]) == 0
    out = capsys.readouterr().out
    assert "k8v8" in out and "Retrieval" not in out


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.svg"
    assert run(["eval", *SMALL, "--plot", str(picture)]) == 0
    assert "<svg" in picture.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv", "k5v5"], "k_bits=5"),
        (["--tasks", "S9"], "unknown task S9"),
        (["--lengths", "long"], "--lengths long"),
        (["--lengths", "99999"], "context"),
        (["--text", "no-such-file"], "cannot read no-such-file"),
        (["--plot", "picture.gif"], ".svg or .png"),
        (["--tasks", "none", "--context", "100"], "use --context 200 or more"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


def test_a_missing_matplotlib_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["eval", "--plot", "picture.svg"]) == 2
    assert "pip install 'leankv-mlx[plot]'" in capsys.readouterr().err
