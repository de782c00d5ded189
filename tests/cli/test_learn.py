"""`leankv learn show` as a command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from leankv_mlx.cache.masks import Masks, save
from leankv_mlx.cli.app import run
from leankv_mlx.evaluation import masks as looks
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.resources import demo_model


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(looks, "_TOKENS", 200)
    monkeypatch.setattr(looks, "_QUESTIONS", 2)


def learned(name: str, model: str) -> Masks:
    alphas = np.random.default_rng(0).uniform(0, 1, (5, 2, 64)).astype(np.float32)
    found = Masks.of(alphas, 0.7, model, "some\x1b[31m model")
    save(found, name)
    return found


def test_what_a_file_tells_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    mask = learned("mine", "a model that is not here")
    assert run(["learn", "show", "mine"]) == 0
    out = capsys.readouterr().out
    assert mask.digest in out and "30.0%" in out and "retrieval" not in out
    assert "\x1b" not in out
    assert run(["learn", "show", "mine", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["kept"] == pytest.approx(0.3) and document["digest"] == mask.digest
    assert mask.digest in captured.err


def test_a_mask_of_the_bundled_model_is_seen_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    learned("mine", fingerprint(demo_model()))
    picture = tmp_path / "picture.svg"
    assert run(["learn", "show", "mine", "--plot", str(picture), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["heads"][0]["layer"], document["heads"][0]["head"]) == (4, 1)
    assert "<svg" in picture.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["other"], 1, "there is no mask 'other'; run leankv learn masks MODEL -o other"),
        (["mine", "--model", str(demo_model())], 1, "not for demo_model"),
        (["mine", "--model", "no-such-folder"], 1, "no model folder no-such-folder"),
        (["mine", "--plot", "picture.gif"], 2, ".svg or .png"),
        (["../mine"], 2, "cannot be called '../mine'"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    learned("mine", "a model that is not here")
    assert run(["learn", "show", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
