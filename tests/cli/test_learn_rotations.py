"""`leankv learn rotations` as a command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leankv_mlx.cache.bases import FILES
from leankv_mlx.cli.app import run
from leankv_mlx.mlx_lm import attach, load
from leankv_mlx.profiles import profiles

FEW = ["--tokens", "512", "--documents", "1"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_basis_and_a_profile_come_of_the_bundled_model(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The user writes of ships, and of the sea that carries them home. " * 300)
    assert run(["learn", "rotations", "-o", "mine", *FEW, "--seed", "5", "--text", str(text)]) == 0
    captured = capsys.readouterr()
    found = FILES.load("mine")
    kvs = [f"k{bits}v{bits},window=32,basis=mine@{found.digest}" for bits in (3, 2)]
    assert captured.out.splitlines() == [
        f"wrote basis mine@{found.digest} to {own_home}/bases/mine.safetensors",
        f"wrote profile mine to {own_home}/profiles.toml: leankv:{kvs[0]}",
        f"wrote profile mine-tiny to {own_home}/profiles.toml: leankv:{kvs[1]}",
        "measure them with leankv eval --kv mine --kv mine-tiny",
    ]
    assert "100%, reading texts" in captured.err
    assert [profiles()[name] for name in ("mine", "mine-tiny")] == kvs
    assert found.notes["seed"] == "5" and found.notes["text"] != "generated"
    with attach(load().model, "mine") as attached:
        assert attached.learned == list(found.layers)
    assert {path.name for path in own_home.rglob("*") if path.is_file()} == {
        "mine.safetensors", "profiles.toml"
    }  # fmt: skip
    matrices = np.array(found.layers[2].matrix)
    assert not np.allclose(matrices, np.eye(matrices.shape[-1]), atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give the basis a name: -o NAME"),
        (["-o", "../mine"], 2, "cannot be called '../mine'"),
        (["-o", "mine", "--documents", "0"], 2, "--documents 0 is too small"),
        (["-o", "mine", "--tokens", "511"], 2, "--tokens 511 is too small"),
        (["-o", "mine", "--tokens", "8193"], 2, "do not fit the model's context of 8192"),
        (["no-such-folder", "-o", "mine"], 1, "no model folder no-such-folder"),
        (["-o", "mine", "--text", "no-such-file.txt"], 2, "cannot read no-such-file.txt"),
        (["-o", "mine", "--text", __file__], 2, "the text is too short for lessons of 4096"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    own_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["learn", "rotations", *arguments]) == code
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("leankv: error: ") and message in line and not captured.out
    assert not own_home.exists()


def test_what_cannot_be_written_is_one_line(
    own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_home.mkdir()
    (own_home / "bases").write_text("no folder")
    assert run(["learn", "rotations", "-o", "mine", *FEW]) == 1
    assert f"cannot write {own_home}/bases/mine.safetensors: " in capsys.readouterr().err
    (own_home / "profiles.toml").write_text("no profiles [")
    assert run(["learn", "rotations", "-o", "mine", *FEW]) == 2
    assert "is not a file of profiles" in capsys.readouterr().err
