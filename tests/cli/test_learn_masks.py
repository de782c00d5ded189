"""`leankv learn masks` as a command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx import nn

from leankv_mlx.cache.masks import Masks, load
from leankv_mlx.cli.app import run
from leankv_mlx.evaluation.lab import Progress
from leankv_mlx.learning import course as courses
from leankv_mlx.learning import lessons
from leankv_mlx.learning import masks as learning
from leankv_mlx.profiles import profiles
from tests.learning import tiny
from tests.models import TINY

FEW = ["--tokens", "512", "--documents", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(lessons, "QUESTIONS", 2)
    monkeypatch.setattr(lessons, "STOPS", 2)
    return tmp_path / "home"


def test_what_cannot_be_written_is_one_line_and_is_not_learned_anew(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_home.mkdir()
    (own_home / "profiles.toml").write_text("no profiles [")
    assert run(["learn", "masks", "-o", "mine", *FEW]) == 2
    assert "is not a file of profiles" in one_line(capsys)
    (own_home / "profiles.toml").unlink()
    (own_home / "masks").write_text("no folder")
    assert run(["learn", "masks", "-o", "mine", *FEW]) == 1
    assert f"cannot write {own_home}/masks/mine.safetensors: " in one_line(capsys)
    (own_home / "masks").unlink()
    monkeypatch.setattr(learning, "_gradient", lambda *_: pytest.fail("it learns"))
    assert run(["learn", "masks", "-o", "mine", *FEW]) == 0
    assert profiles()["mine"] == f"k4v4,mask=mine@{load('mine').digest}"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error; nothing else was printed, but for how far learning was."""
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.strip().splitlines()
    (line,) = (line for line in lines if not line.startswith("leankv: note: "))
    assert line.startswith("leankv: error: ") and "Error:" not in line
    return line


def test_a_mask_and_a_profile_come_of_the_bundled_model(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The user writes of ships, and of the sea that carries them home. " * 300)
    options = ["--ratio", "0.7", "--seed", "5", "--text", str(text)]
    assert run(["learn", "masks", "-o", "mine", *FEW, *options]) == 0
    out = capsys.readouterr().out.splitlines()
    found = load("mine")
    kv = f"k4v4,mask=mine@{found.digest}"
    assert profiles()["mine"] == kv
    assert out == [
        f"wrote mask mine@{found.digest} to {own_home}/masks/mine.safetensors",
        f"wrote profile mine to {own_home}/profiles.toml: leankv:{kv}",
        "measure it with leankv eval --kv mine, look at it with leankv learn show mine",
    ]
    assert found.groups.sum() == 6  # of 5 layers with 2 heads of 2 groups
    assert found.notes["seed"] == "5" and found.notes["text"] != "generated"
    files = {path.name for path in own_home.rglob("*") if path.is_file()}
    assert files == {"mine.safetensors", "profiles.toml"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give the mask a name: -o NAME"),
        (["-o", "../mine"], 2, "cannot be called '../mine'"),
        (["-o", "k4v4"], 2, "cannot be called 'k4v4'"),
        (["-o", "mine", "--ratio", "0"], 2, "--ratio 0 is out of range"),
        (["-o", "mine", "--ratio", "1.5"], 2, "--ratio 1.5 is out of range"),
        (["-o", "mine", "--ratio", "nan"], 2, "--ratio nan is out of range"),
        (["-o", "mine", "--ratio", "most"], 2, "'--ratio': Input should be a valid number"),
        (["-o", "mine", "--by", "luck"], 2, "--by luck is unknown; use one of learned, keys, "),
        (["-o", "mine", "--steps", "1"], 2, "--steps 1 is too small"),
        (["-o", "mine", "--documents", "0"], 2, "--documents 0 is too small"),
        (["-o", "mine", "--tokens", "511"], 2, "--tokens 511 is too small"),
        (["-o", "mine", "--tokens", "8100"], 2, "do not fit the model's context of 8192"),
        (["no-such-folder", "-o", "mine"], 1, "no model folder no-such-folder"),
        (["-o", "mine", "--text", "no-such-file.txt"], 2, "cannot read no-such-file.txt"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    own_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["learn", "masks", *arguments]) == code
    assert message in one_line(capsys)
    assert not own_home.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is too short for lessons of 512 tokens"),
        (b"Only this, and nothing more.", "the text is too short for lessons of 512 tokens"),
        (b"\xff\xfe\x00 no text", "cannot read"),
    ],
)
def test_a_text_that_is_none_is_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    options = ["-o", "mine", "--text", str(tmp_path / "own.txt")]
    assert run(["learn", "masks", *options, *FEW]) == 2
    assert message in one_line(capsys)


def unlike() -> nn.Module:
    """A model whose layers have 2 and 4 KV heads."""
    from mlx_lm.models import openelm

    args = openelm.ModelArgs(
        model_type="openelm", head_dim=64, num_transformer_layers=2, model_dim=128, vocab_size=128,
        ffn_dim_divisor=64, num_query_heads=[4, 4], num_kv_heads=[2, 4], ffn_multipliers=[1.0, 1.0],
    )  # fmt: skip
    model: nn.Module = openelm.Model(args)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TINY["gemma2"], "learning masks does not go with this model, whose attention does not"),
        (TINY["deepseek_v3"], "of whose cache nothing is compressed"),
        (unlike, "whose layers have heads of several numbers or sizes"),
    ],
)
def test_models_that_can_have_no_mask_are_one_line(
    make: Callable[[], nn.Module],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(courses, "load", lambda *_, **__: tiny.loaded(make()))
    assert run(["learn", "masks", "some-model", "-o", "mine", *FEW]) == 1
    assert message in one_line(capsys)


def test_progress_and_nothing_else_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taught(*arguments: Any) -> tuple[Masks, Path]:
        (progress,) = (x for x in arguments if isinstance(x, Progress))
        progress.start(100)
        progress.advance("step 3 of 7, divergence 0.1234", 50)
        return tiny.masks(2, 2, 64), Path("there")

    monkeypatch.setattr(courses, "taught", taught)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert run(["learn", "masks", "-o", "mine"]) == 0
    captured = capsys.readouterr()
    assert "step 3 of 7, divergence 0.1234" in captured.err and "50%" in captured.err
    assert len(captured.out.splitlines()) == 3 and "step 3" not in captured.out


def test_an_interrupted_run_ends_as_others_do(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taught(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(courses, "taught", taught)
    assert run(["learn", "masks", "-o", "mine"]) == 130
    assert "Traceback" not in capsys.readouterr().err and not own_home.exists()
