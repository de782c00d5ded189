"""Bits of layers go where they take most divergence away, and become profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leankv_mlx.cli.app import run
from leankv_mlx.config import CompressionConfig
from leankv_mlx.evaluation import allocation
from leankv_mlx.evaluation.allocation import Allocation, _costs, _greedy, _uniform
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.profiles import user_profiles

QUICK = ["--context", "256", "--chunks", "1"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return tmp_path


def test_bits_go_where_they_take_most_away() -> None:
    levels = [2, 3, 4, 8]
    cost = np.array([[[9.0, 0.1, 0.05, 0.0], [0.2, 0.1, 0.05, 0.0]],
                     [[1.0, 0.9, 0.8, 0.0], [0.3, 0.2, 0.1, 0.0]]])  # fmt: skip
    assert _greedy(cost, levels, 2).tolist() == [[0, 0], [0, 0]]
    assert _greedy(cost, levels, 2.25).tolist() == [[1, 0], [0, 0]]
    # A curve that falls late is seen too: six bits for 1.0 are more than 0.1 for each of them.
    assert _greedy(cost, levels, 3.75).tolist() == [[1, 0], [3, 0]]
    assert _greedy(cost, levels, 8).tolist() == [[3, 3], [3, 3]]


def test_the_uniform_setting_of_so_many_bits() -> None:
    assert [_uniform(x) for x in (2, 2.6, 3, 3.5, 4, 5.9, 6, 8)] == [
        (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (8, 3), (8, 4), (8, 8),
    ]  # fmt: skip


def test_a_layer_costs_what_it_does_alone_and_falls_as_its_side_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Divergences are made up: with 3 bits 1 for the keys of layer 0, 5 for those of layer 1, a
    tenth of that for values, and four times as much for each bit less."""

    def divergence(bits: np.ndarray) -> float:
        size = np.array([[1.0, 0.1], [5.0, 0.5]])
        lost = (size * 4.0 ** (3 - bits) * (bits < 8)).sum()
        return float(lost if (bits < 8).sum() == 1 else 0.9 * lost)

    def klds(loaded: Any, arms: list[Arm], *rest: Any) -> dict[str, float]:
        configs = {arm.kv: arm.config for arm in arms}
        return {kv: divergence(np.array(c.layer_bits)) for kv, c in configs.items() if c}

    monkeypatch.setattr(allocation, "_klds", klds)
    plain = CompressionConfig.parse("leankv:k4v4")
    cost = _costs(None, plain, 2, None, None)  # type: ignore[arg-type]
    np.testing.assert_allclose(cost[0, 0], [4, 1, 0.25, 0])
    np.testing.assert_allclose(cost[1, 1], [2, 0.5, 0.125, 0])


ALLOCATED = [
    Allocation(((3, 2), (2, 2)), 0.04, ((2, 2), 0.05)),
    Allocation(((4, 3), (3, 2)), 0.008, ((3, 3), 0.009)),
]


def test_settings_that_keep_all_tokens_become_a_profile_for_each_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocation, "allocate", lambda *arguments: ALLOCATED[: len(arguments[3])])
    options = ["--kv", "k3v3,window=32", "--bits", "2.25,3", "--json", *QUICK]
    assert run(["calibrate", "mine", *options]) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["profiles"]
    assert (first["profile"], second["profile"]) == ("mine-2_25", "mine-3")
    config = CompressionConfig.parse("leankv:mine-3")
    assert (config.layer_bits, config.window) == (ALLOCATED[1].bits, 32)
    assert first["layer_bits_kld"] == 0.04 and first["uniform"]["k_bits"] == 2
    assert run(["calibrate", "one", "--kv", "k3v3", "--bits", "2.25", *QUICK]) == 0
    assert "2.25" in capsys.readouterr().out
    assert CompressionConfig.parse("leankv:one").layer_bits == ALLOCATED[0].bits


@pytest.mark.parametrize(
    ("bits", "message"),
    [("two", "not understood"), ("", "not understood"), ("1.9", "out of range"),
     ("2,9", "out of range"), ("nan", "out of range")],
)  # fmt: skip
def test_bits_that_make_no_sense(
    bits: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["calibrate", "mine", "--kv", "k3v3", "--bits", bits, *QUICK]) == 2
    assert message in capsys.readouterr().err
    assert not user_profiles().exists()


def test_a_policy_is_swept_with_one_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "mine", "--bits", "2,3", *QUICK]) == 2
    assert "several --bits go with a --kv that keeps all tokens" in capsys.readouterr().err


def test_it_measures_through_the_real_cache(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv", "k3v3", "--bits", "2.5", "--json", *QUICK]
    assert run(["calibrate", "mine", *options]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["profiles"]
    bits = np.array(found["layer_bits"])
    assert bits.mean() <= 2.5 and bits.min() >= 2
    assert 0 < found["layer_bits_kld"] < 1
