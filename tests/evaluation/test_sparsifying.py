"""Activation sparsity from calibration to decode steps, on the bundled model in 4 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cli import sparsify
from leankv_mlx.cli.app import run
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import CalibrationError, ConfigError
from leankv_mlx.evaluation import sparsifying
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.evaluation.fidelity import corpus, run_fidelity
from leankv_mlx.evaluation.sparsifying import Trial, thresholds
from leankv_mlx.mlx_lm import LoadedModel, attach, load, make_caches
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.profiles import user_profiles
from leankv_mlx.projections import attach as attach_products
from leankv_mlx.projections.sparsity import Sparsity, Thresholds, find, save
from leankv_mlx.projections.sparsity.measure import Seen
from leankv_mlx.resources import demo_model
from leankv_mlx.settings import Sparse
from tests.models import TINY
from tests.quantized_model import quantized_demo

QUICK = ["--context", "256", "--chunks", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_demo(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


@pytest.fixture(scope="module")
def found(loaded: LoadedModel) -> Thresholds:
    chunks = corpus(loaded, None, 256, 1).chunks
    made = thresholds(loaded.model, "wina", "model", [0.5, 0.25], chunks, ignore)
    return replace(made, model=fingerprint(loaded.path), name="small")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return tmp_path


def ignore(what: str, tokens: int) -> None:
    pass


def sparse_arm(found: Thresholds, share: float) -> Arm:
    config = CompressionConfig(sparse=Sparse(share))
    return Arm(f"sparse={share}", config, Sparsity(found.keeps(share)))


def seen(loaded: LoadedModel) -> Seen:
    made = Seen()
    with attach_products(loaded.model, made):
        loaded.model(mx.array([[1]]))
    return made


# The command.


def test_the_command_measures_and_keeps_what_decode_steps_then_leave_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder), "--sparse", "0.25,50%", "--limit", "1", *QUICK]
    assert run(["calibrate", "mine", *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["kv"] == "leankv:k4v4,sparse=0.5@mine" and document["within"] == [0.25, 0.5]
    mild, strong = document["trials"]
    assert mild["read"] == pytest.approx(0.75, abs=0.06)
    assert strong["read"] == pytest.approx(0.5, abs=0.06)
    assert 0 < mild["kld"] < strong["kld"] < 1
    assert find(fingerprint(folder), "small", Sparse(0.25, "mine")).by == "wina"
    assert CompressionConfig.parse("leankv:mine").sparse == Sparse(0.5, "mine")
    options = ["--model", str(folder), "--tasks", "none", *QUICK, "--json"]
    assert (
        run(["eval", "--kv", "leankv:mine", "--kv", "k4v4,skip=0.001,sparse=0.25", *options]) == 0
    )
    arms = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert arms[1]["kld"]["mean"] > arms[2]["kld"]["mean"] > 0
    options = ["--model", str(folder), "--prompt", "hello", "--max-tokens", "4"]
    assert run(["generate", *options, "--kv", "leankv:mine"]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    read = int(line.rpartition("weights read ")[2].rstrip("%"))
    assert 35 < read < 65
    options += ["--draft-model", str(demo_model()), "--num-draft-tokens", "2"]
    assert run(["generate", *options, "--kv", "leankv:mine"]) == 0  # drafts need no thresholds
    assert "weights read" in capsys.readouterr().err


def test_what_costs_more_than_the_limit_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tried(*arguments: Any) -> list[Trial]:
        return [Trial(0.1, 0.9, 5.0, 0.002, 0.01), Trial(0.2, 0.8, 5.5, 0.1, 0.1)]

    monkeypatch.setattr(sparsifying, "tried", tried)
    options = ["--model", str(folder), "--sparse", "0.1,0.2", "--spread", "uniform", *QUICK]
    assert run(["calibrate", "mine", *options]) == 0
    assert find(fingerprint(folder), "small", Sparse(0.1)).shares == (0.1,)
    assert CompressionConfig.parse("leankv:mine").sparse == Sparse(0.1, "mine")
    assert run(["calibrate", "other", *options, "--limit", "0.001"]) == 1
    assert "no share stays within --limit 0.001" in capsys.readouterr().err
    assert "other" not in user_profiles().read_text()
    with pytest.raises(CalibrationError, match="no thresholds 'other'"):
        find(fingerprint(folder), "small", Sparse(0.1, "other"))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--sparse", "0.95"], 2, "sparse=0.95 is out of range"),
        (["--sparse", "0"], 2, "--sparse 0 is not understood"),
        (["--sparse", "0.2@mine"], 2, "is not understood"),
        (["--sparse", "some"], 2, "is not a number"),
        (["--sparse", "0.25", "--by", "size"], 2, "--by size is unknown; use one of teal, wina"),
        (["--sparse", "0.25", "--spread", "all"], 2, "use one of uniform, block, model"),
        (["--sparse", "0.25", "--bits", "4"], 2, "two calibrations"),
        (["--sparse", "0.25", *QUICK], 1, "no quantized layers of a known kind"),
    ],
)
def test_what_cannot_be_calibrated_is_told(
    options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["calibrate", "mine", *options]) == code
    assert message in capsys.readouterr().err


def test_thresholds_are_tried_on_another_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("The river was low. " * 100)
    options = ["--model", str(folder), "--text", str(tmp_path / "text"), "--context", "384"]
    assert run(["calibrate", "mine", "--sparse", "0.25", *options]) == 2
    assert "tried on another one than they are found on" in capsys.readouterr().err


def test_shares_are_read_and_sorted() -> None:
    assert sparsify.parsed_shares("40%,0.25,0.40") == [0.25, 0.4]


# Who leaves out how much.


@pytest.mark.parametrize("by", ["teal", "wina"])
@pytest.mark.parametrize("spread", ["uniform", "block", "model"])
def test_every_spread_leaves_out_the_share(loaded: LoadedModel, by: Any, spread: Any) -> None:
    chunks = corpus(loaded, None, 256, 1).chunks
    made = thresholds(loaded.model, by, spread, [0.4], chunks, ignore)
    assert (made.norms != ()) == (by == "wina") and len(made.inputs) == 20
    sparsity = Sparsity(made.keeps(0.4))
    read = []
    with attach_products(loaded.model, sparsity):
        for i in range(100, 180, 8):
            mx.eval(loaded.model(chunks[0].tokens[None, i : i + 8]))
            read.append(sparsity.weights_read)
    assert np.mean(read) == pytest.approx(0.6, abs=0.08)


def test_an_input_that_the_model_needs_keeps_its_channels(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = corpus(loaded, None, 256, 1).chunks
    plain = thresholds(loaded.model, "teal", "model", [0.3], chunks, ignore)

    def worth(model: Any, known: Any, *arguments: Any) -> Any:
        found = np.ones(len(known.inputs))
        found[3] = 1e9
        return found

    monkeypatch.setattr(sparsifying, "_worth", worth)
    changed = thresholds(loaded.model, "teal", "model", [0.3], chunks, ignore)
    assert changed.values[0][3] == 0 < plain.values[0][3]


# Steps.


def test_arms_side_by_side_are_what_each_is_alone(loaded: LoadedModel, found: Thresholds) -> None:
    """The kind of fault: a model's products are those of whoever was attached last."""
    texts = corpus(loaded, None, 256, 1)
    base, whole = Arm("none", None), Arm.parse("k4v4")
    sparse = [sparse_arm(found, share) for share in (0.25, 0.5)]
    together = run_fidelity(loaded, [base, whole, *sparse], texts, ignore)
    for arm in (whole, *sparse):
        assert run_fidelity(loaded, [base, arm], texts, ignore)[arm.kv] == together[arm.kv]
    assert together["k4v4"].kld["mean"] < together["sparse=0.25"].kld["mean"]
    assert together["sparse=0.25"].kld["mean"] < together["sparse=0.5"].kld["mean"]
    assert together["none"].kld["mean"] == 0


def test_a_prompt_is_read_with_all_channels_however_short(
    loaded: LoadedModel, found: Thresholds
) -> None:
    """What is stored of a document does not depend on thresholds."""

    def state(sparsity: Sparsity | None) -> tuple[list[mx.array], mx.array]:
        with attach(loaded.model, "leankv", sparsity):
            caches = make_caches(loaded.model)
            prefill(loaded.model, [5, 6, 7, 8, 9], caches)
            kept = [mx.array(cache.state.layer.exact.k) for cache in caches]
            return kept, loaded.model(mx.array([[3]]), cache=caches)

    sparse, whole = state(Sparsity(found.keeps(0.5))), state(None)
    assert all(mx.array_equal(a, b) for a, b in zip(sparse[0], whole[0], strict=True))
    assert not mx.array_equal(sparse[1], whole[1])


def test_a_share_of_0_changes_nothing(loaded: LoadedModel) -> None:
    def logits(kv: str) -> mx.array:
        with attach(loaded.model, kv) as attachment:
            out = loaded.model(mx.array([[3, 4, 5]]), cache=make_caches(loaded.model))
            mx.eval(out)
            assert attachment.weights_read == 1
        return out

    assert mx.array_equal(logits("leankv"), logits("leankv:sparse=0"))


# Refusals.


def test_without_a_calibration_the_command_is_told(loaded: LoadedModel) -> None:
    with pytest.raises(CalibrationError, match=r"run leankv calibrate NAME --sparse 0\.25"):
        attach(loaded.model, "leankv:sparse=0.25")
    with pytest.raises(CalibrationError, match="run leankv calibrate mine --sparse"):
        attach(loaded.model, "leankv:sparse=0.25@mine")


def test_thresholds_of_other_layers_are_refused(loaded: LoadedModel, found: Thresholds) -> None:
    save(found, "mine")
    attach(loaded.model, "leankv:sparse=0.25")
    narrower = {at: n - 1 for at, n in found.inputs.items()}
    norms = tuple(norm[:-1] for norm in found.norms)
    save(replace(found, inputs=narrower, norms=norms), "mine")
    with pytest.raises(CalibrationError, match="do not fit the layers of small"):
        attach(loaded.model, "leankv:sparse=0.25")


def test_products_that_can_leave_nothing_out(loaded: LoadedModel, found: Thresholds) -> None:
    save(found, "mine")
    with pytest.raises(ConfigError, match="does nothing with projections=mlx"):
        attach(loaded.model, "leankv:sparse=0.25,projections=mlx")
    with pytest.raises(CalibrationError, match="needs the folder of the model"):
        attach(TINY["llama"](), "leankv:sparse=0.25")
