"""Activation sparsity: thresholds from histograms, who leaves out how much, the file, and steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn

from leankv_mlx.errors import CalibrationError
from leankv_mlx.folders import folder
from leankv_mlx.projections import Input, attach
from leankv_mlx.projections.sparsity import Sparsity, Thresholds, find, save
from leankv_mlx.projections.sparsity.allocation import LEVELS, allocated
from leankv_mlx.projections.sparsity.histogram import BINS, TAIL, Histogram
from leankv_mlx.projections.sparsity.measure import Errors, Only, Seen, Sizes
from leankv_mlx.projections.types import Keep
from leankv_mlx.settings import Sparse
from tests.models import TINY

INPUTS = {Input(0, "attention"): 4, Input(0, "mlp_out"): 6}
GOOD = Thresholds(
    "wina", (0.25, 0.5), INPUTS, np.array([[0.1, 0.2], [0.3, 0.4]], np.float32),
    (np.ones(4, np.float32), np.full(6, 2, np.float32)), "model-1", "small",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return tmp_path


# Histograms.


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    share=st.floats(0.01, 0.9),
    power=st.sampled_from([1.0, 2.0, 3.0]),
    parts=st.integers(1, 4),
)
def test_a_threshold_is_the_quantile_to_a_bin(
    seed: int, share: float, power: float, parts: int
) -> None:
    sizes = np.abs(np.random.default_rng(seed).standard_normal((4096, parts))) ** power
    sizes = sizes.astype(np.float32)
    histogram = Histogram()
    for part in sizes.T:
        histogram.add(part)
    width = np.quantile(sizes[:, 0], 1 - TAIL) / BINS
    wanted = np.quantile(sizes, share, method="inverted_cdf")
    assert histogram.threshold(share) == pytest.approx(float(wanted), abs=1.01 * float(width))


def test_a_few_huge_channels_move_no_threshold() -> None:
    sizes = np.abs(np.random.default_rng(0).standard_normal(10_000)).astype(np.float32)
    plain, spiked = Histogram(), Histogram()
    plain.add(sizes)
    spiked.add(np.concatenate([sizes, np.full(50, 1e6, np.float32), [np.inf, np.nan]]))
    assert spiked.threshold(0.5) == pytest.approx(plain.threshold(0.5), rel=0.05)


def test_inputs_of_zeros_and_thresholds_above_the_bins() -> None:
    histogram = Histogram()
    assert histogram.threshold(0.5) == 0  # nothing was seen
    histogram.add(np.zeros(100, np.float32))
    assert histogram.threshold(0.5) == 0
    histogram.add(np.full((2, 50), 3, np.float32))
    assert histogram.threshold(0.25) <= 3 / BINS
    assert 0 < histogram.threshold(0.9) <= 3
    for _ in range(9):
        histogram.add(np.full(1000, 9, np.float32))  # more than the first numbers told
    assert histogram.threshold(0.9) == 3


# Allocation.


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 20), share=st.floats(0.01, 0.9), n=st.integers(1, 12))
def test_an_allocation_leaves_out_the_share_and_no_input_more_than_it_may(
    seed: int, share: float, n: int
) -> None:
    rng = np.random.default_rng(seed)
    costs, sizes = rng.random((n, len(LEVELS))) - 0.2, rng.integers(1, 1000, n).astype(float)
    shares = allocated(costs, sizes, share)
    assert (shares * sizes).sum() == pytest.approx(share * sizes.sum(), rel=1e-6)
    assert shares.min() >= 0 and shares.max() <= LEVELS[-1] + 1e-9


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 20), share=st.floats(0.05, 0.85))
def test_with_convex_costs_no_other_allocation_is_cheaper(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    weights, sizes = rng.uniform(0.1, 10, 5), rng.integers(1, 9, 5).astype(float)
    costs = weights[:, None] * LEVELS**2
    shares = allocated(costs, sizes, share)

    def cost(parts: np.ndarray) -> float:
        return float(sum(np.interp(p, LEVELS, c) for p, c in zip(parts, costs, strict=True)))

    least = cost(shares)
    assert least <= cost(np.full(5, share)) + 1e-9
    for _ in range(20):  # moving bytes from one input to another gains nothing
        i, j = rng.choice(5, 2, replace=False)
        moved, by = shares.copy(), 0.02
        moved[i] += by / sizes[i]
        moved[j] -= by / sizes[j]
        if moved[j] >= 0 and moved[i] <= LEVELS[-1]:
            assert cost(moved) >= least - 1e-9


def test_a_cost_that_falls_late_is_not_stopped_at() -> None:
    costs = np.zeros((2, len(LEVELS)))
    costs[0] = np.minimum(LEVELS, 0.05) * 20  # all of it at the first step
    costs[1] = LEVELS * 2
    shares = allocated(costs, np.ones(2), 0.4)
    assert shares[0] > 0.75  # 1.0 for 0.9 is less than 2.0 for each


# The file.


def test_what_is_kept_is_found_again_by_model_share_and_name() -> None:
    save(GOOD, "first")
    for sparse in (Sparse(0.25), Sparse(0.5, "first")):
        found = find("model-1", "small", sparse)
        assert found.inputs == INPUTS and found.by == "wina" and found.shares == (0.25, 0.5)
        np.testing.assert_array_equal(found.values, GOOD.values)
    keep = find("model-1", "small", Sparse(0.5)).keeps(0.5)[Input(0, "mlp_out")]
    assert keep.threshold == pytest.approx(0.4)
    assert keep.norms is not None and keep.norms.tolist() == [2] * 6
    save(replace(GOOD, by="teal", norms=()), "second")
    os.utime(folder("config") / "thresholds" / "first.safetensors", (1, 1))
    assert find("model-1", "small", Sparse(0.25)).by == "teal"  # the latest
    assert find("model-1", "small", Sparse(0.25)).keeps(0.25)[Input(0, "mlp_out")].norms is None
    assert find("model-1", "small", Sparse(0.25, "first")).by == "wina"
    assert not list((folder("config") / "thresholds").glob(".*"))


def refused(model: str, sparse: Sparse) -> str:
    with pytest.raises(CalibrationError) as error:
        find(model, "small", sparse)
    assert "\n" not in str(error.value) and "leankv calibrate" in str(error.value)
    return str(error.value)


def test_what_is_missing_or_for_another_model_is_told_with_the_command_to_run() -> None:
    assert "--sparse 0.25" in refused("model-1", Sparse(0.25))
    assert "no thresholds 'mine'" in refused("model-1", Sparse(0.25, "mine"))
    save(GOOD, "mine")
    told = refused("model-2", Sparse(0.25, "mine"))
    assert "are for small" in told and "calibrate mine --sparse 0.25" in told
    assert "not calibrated" in refused("model-2", Sparse(0.25))
    assert "there are 0.25, 0.5" in refused("model-1", Sparse(0.3))


def test_a_file_that_is_damaged_anywhere_is_refused() -> None:
    path = save(GOOD, "mine")
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        assert "cannot be used" in refused("model-1", Sparse(0.25, "mine"))
    for size in (0, 7, 200, len(good) - 1):
        path.write_bytes(good[:size])
        assert "cannot be used" in refused("model-1", Sparse(0.25, "mine"))
    path.write_bytes(good)
    assert find("model-1", "small", Sparse(0.25, "mine")).shares == (0.25, 0.5)


WRONG = {
    "another number of rows": {"values": np.zeros((1, 2), np.float32)},
    "too few norms": {"norms": (np.ones(4, np.float32), np.ones(5, np.float32))},
    "negative": {"values": np.full((2, 2), -1, np.float32)},
    "no numbers": {"values": np.full((2, 2), np.nan, np.float32)},
    "a share of all": {"shares": (0.25, 1.0)},
    "no share": {"shares": (), "values": np.zeros((0, 2), np.float32)},
    "no channels": {"inputs": {Input(0, "attention"): 0, Input(0, "mlp_out"): 6}},
    "a layer below 0": {"inputs": {Input(-1, "attention"): 4, Input(0, "mlp_out"): 6}},
    "another kind": {"by": "other"},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_whose_content_contradicts_itself_is_refused(what: str) -> None:
    save(replace(GOOD, **WRONG[what]), "mine")  # type: ignore[arg-type]
    assert "it is damaged" in refused("model-1", Sparse(0.25, "mine"))


def test_a_damaged_file_of_somebody_else_is_in_nobodys_way() -> None:
    save(GOOD, "mine").with_name("other.safetensors").write_bytes(b"nothing")
    assert find("model-1", "small", Sparse(0.25)).shares == (0.25, 0.5)


def test_another_place_that_cannot_be_written(own_home: Path) -> None:
    (own_home / "thresholds").write_text("a file")
    with pytest.raises(CalibrationError, match="cannot write"):
        save(GOOD, "mine")


# Steps of a model.


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = TINY["qwen3"]()
    nn.quantize(made, 32, 4)
    mx.eval(made.parameters())
    return made


def logits(model: nn.Module, rows: int, inputs: Sparsity | None) -> mx.array:
    tokens = mx.arange(rows)[None] % 100
    with attach(model, inputs):
        out: mx.array = model(tokens)
        mx.eval(out)
    return out


def everything(model: nn.Module, keep: Keep) -> Sparsity:
    seen = Seen()
    with attach(model, seen):
        model(mx.array([[1]]))
    return Sparsity(dict.fromkeys(seen.weights, keep))


@pytest.mark.parametrize("rows", [1, 8])
def test_few_rows_leave_out_and_many_do_not(model: nn.Module, rows: int) -> None:
    sparsity = everything(model, Keep(0.5))
    assert not mx.array_equal(logits(model, rows, sparsity), logits(model, rows, None))
    assert 0.1 < sparsity.weights_read < 0.95
    assert mx.array_equal(logits(model, 9, sparsity), logits(model, 9, None))
    assert sparsity.weights_read == 1
    with sparsity.resting():
        assert mx.array_equal(logits(model, rows, sparsity), logits(model, rows, None))
    assert sparsity.weights_read == 1


def test_a_threshold_of_0_leaves_everything_as_it_is(model: nn.Module) -> None:
    sparsity = everything(model, Keep(0.0))
    whole = logits(model, 1, None)
    assert mx.allclose(logits(model, 1, sparsity), whole, rtol=1e-4, atol=1e-5)
    assert sparsity.weights_read > 0.98  # a gate that is shut makes zeros
    assert everything(model, Keep(1e9)).weights_read == 1  # nothing was read yet


def test_what_was_read_is_counted_in_bytes(model: nn.Module) -> None:
    nothing = everything(model, Keep(1e9))
    logits(model, 1, nothing)
    assert nothing.weights_read == 0
    seen = Seen()
    with attach(model, seen):
        model(mx.array([[1]]))
    one = Sparsity({Input(1, "mlp_out"): Keep(1e9)})
    logits(model, 2, one)
    sizes = dict(zip(seen.weights, seen.sizes(), strict=True))
    share = sizes[Input(1, "mlp_out")] / sum(sizes.values())
    assert one.weights_read == pytest.approx(1 - share)


def test_thresholds_of_a_histogram_leave_out_what_they_say(model: nn.Module) -> None:
    tokens = mx.random.randint(0, 128, (1, 200), key=mx.random.key(3))
    seen = Seen()
    with attach(model, seen):
        model(tokens[:, :1])
        norms = seen.norms()
        sizes = Sizes(seen, norms)
        with attach(model, sizes):
            model(tokens)
    for share in (0.25, 0.5):
        keeps = {
            at: Keep(each.threshold(share), norms[at]) for at, each in sizes.histograms.items()
        }
        read = []
        for i in range(0, 200, 8):
            sparsity = Sparsity(keeps)
            with attach(model, sparsity):
                mx.eval(model(tokens[:, i : i + 8]))
            read.append(sparsity.weights_read)
        assert np.mean(read) == pytest.approx(1 - share, abs=0.08)  # of shorter texts


def test_norms_are_those_of_the_columns(model: nn.Module) -> None:
    seen = Seen()
    with attach(model, seen):
        model(mx.array([[1]]))
        norms = seen.norms()
    mlp = model.layers[1].mlp
    weights = [
        mx.dequantize(p.weight, p.scales, p.biases, 32, 4) for p in (mlp.gate_proj, mlp.up_proj)
    ]
    wanted = mx.linalg.norm(mx.concatenate(weights), axis=0)
    np.testing.assert_allclose(norms[Input(1, "mlp")], wanted, rtol=1e-4)


def test_errors_grow_with_what_is_left_out_and_are_those_of_the_outputs(model: nn.Module) -> None:
    tokens = mx.random.randint(0, 128, (1, 64), key=mx.random.key(4))
    seen = Seen()
    with attach(model, seen):
        model(tokens[:, :1])
        sizes = Sizes(seen, {})
        with attach(model, sizes):
            model(tokens)
        levels = {
            at: np.array([each.threshold(level) for level in LEVELS])
            for at, each in sizes.histograms.items()
        }
        errors = Errors(levels, {})
        with attach(model, errors):
            model(tokens)
    found = errors.relative()
    assert found.shape == (len(seen.weights), len(LEVELS))
    assert (found[:, 0] == 0).all() and (np.diff(found, axis=1) >= -1e-6).all()
    assert (found[:, -1] > found[:, 5]).all() and found.max() < 2


def test_one_input_alone_in_calls_of_any_size(model: nn.Module) -> None:
    only = Only(Input(0, "mlp_out"), Keep(1e9))
    with attach(model, only):
        changed = model(mx.arange(20)[None])
        mx.eval(changed)
    assert not mx.array_equal(changed, logits(model, 20, None))
    assert only.keep(Input(0, "mlp_out"), 500) is not None
    assert only.keep(Input(1, "mlp_out"), 1) is None
