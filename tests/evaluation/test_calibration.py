"""Calibration picks what it measured, and keeps it where `--kv` finds it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from leankv_mlx import profiles
from leankv_mlx.cli.app import run
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.evaluation import calibration
from leankv_mlx.evaluation.arms import Arm, Size
from leankv_mlx.evaluation.calibration import Candidate, candidates
from leankv_mlx.policies import Budget, Policy, Threshold
from leankv_mlx.profiles import profiles as all_profiles
from leankv_mlx.profiles import save_profile, user_profiles
from leankv_mlx.scorers import Repeat

QUICK = ["--tasks", "none", "--context", "256", "--chunks", "1"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return tmp_path


def policies(arms: list[Arm]) -> list[Policy]:
    return [arm.config.policy for arm in arms if arm.config]


def test_candidates_are_the_policys_own_settings() -> None:
    budget = candidates(CompressionConfig.parse("leankv:policy=budget,window=32"))
    ratios = [policy.ratio for policy in policies(budget) if isinstance(policy, Budget)]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) == len(calibration.RATIOS)
    alphas = candidates(CompressionConfig.parse("leankv:k8v4,policy=threshold"))
    lows = [policy.alpha_low for policy in policies(alphas) if isinstance(policy, Threshold)]
    assert lows == [10, 4, 2, 1, 0.5, 0.2, 0.02]
    with pytest.raises(UsageError, match="policy=streaming has nothing to calibrate"):
        candidates(CompressionConfig.parse("leankv:policy=streaming"))


def found(*rows: tuple[str, float, bool]) -> list[Candidate]:
    return [Candidate(kv, Size(1.0, 1.0, ratio), 0.01, None, ok) for kv, ratio, ok in rows]


def test_the_smallest_cache_within_limits_becomes_a_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = found(
        ("policy=budget,ratio=20", 18.0, False), ("policy=budget,ratio=6", 5.5, True),
        ("policy=budget,ratio=4", 3.9, True),
    )  # fmt: skip
    monkeypatch.setattr(calibration, "sweep", lambda *arguments: rows)
    assert run(["calibrate", "mine", "--json", *QUICK]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["profile"] == "mine" and document["kv"] == "policy=budget,ratio=6"
    assert len(document["candidates"]) == 3
    config = CompressionConfig.parse("leankv:mine,window=128")
    assert (config.policy, config.window) == (Budget(ratio=6), 128)
    assert (
        "5.5 times smaller"
        in tomllib.loads(user_profiles().read_text())["profiles"]["mine"]["about"]
    )


def test_nothing_within_limits_is_an_error_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = found(("policy=budget,ratio=20", 18.0, False))
    monkeypatch.setattr(calibration, "sweep", lambda *arguments: rows)
    assert run(["calibrate", "mine", *QUICK]) == 1
    assert "no candidate stays within --kld 0.02" in capsys.readouterr().err
    assert not user_profiles().exists()


def test_what_the_policy_did_not_do_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The kind of fault: a setting is written that did nothing where it was measured."""
    assert run(["calibrate", "mine", *QUICK]) == 1  # 128 tokens: no head loses one of them
    assert "no candidate dropped a token at --context 256" in capsys.readouterr().err
    assert not user_profiles().exists()


def test_of_candidates_that_measure_the_same_the_mildest_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = found(
        ("policy=budget,ratio=20", 9.003, True), ("policy=budget,ratio=12", 9.0, True),
        ("policy=budget,ratio=9", 9.0, True), ("policy=budget,ratio=4", 3.9, True),
    )  # fmt: skip
    monkeypatch.setattr(calibration, "sweep", lambda *arguments: rows)
    assert run(["calibrate", "mine", *QUICK]) == 0
    assert CompressionConfig.parse("leankv:mine").policy == Budget(ratio=9)


def test_it_measures_through_the_real_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "RATIOS", (3.0, 30.0))
    options = ["--kld", "5", "--tasks", "S2", "--lengths", "400", "--samples", "1"]
    options += ["--context", "1536", "--chunks", "1", "--json"]
    assert run(["calibrate", "mine", *options]) == 0
    small, large = json.loads(capsys.readouterr().out.splitlines()[-1])["candidates"]
    assert small["ratio"] > large["ratio"] and small["kld"] > large["kld"] > 0
    assert small["retrieval"] is not None


@pytest.mark.parametrize("name", ["", "k4v4", "3d", "a b", "a.b", "x=y", "../x"])
def test_names_that_a_setting_could_not_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", name, *QUICK]) == 2
    assert "cannot be called" in capsys.readouterr().err


def test_other_profiles_of_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "profiles.toml"
    save_profile(path, "one", "k4v4", 'about "one" \x7f\n')
    save_profile(path, "two", "k3v3", "")
    save_profile(path, "one", "k8v8", "again")
    rows = tomllib.loads(path.read_text())["profiles"]
    assert rows == {"one": {"kv": "k8v8", "about": "again"}, "two": {"kv": "k3v3", "about": ""}}
    assert [p.name for p in path.parent.iterdir()] == ["profiles.toml"]


@pytest.mark.parametrize(
    "text", ["{", "profiles = 3", "[profiles.x]\nabout = ''", "[profiles.x]\nkv = 4", "\x00"]
)
def test_a_damaged_file_of_profiles_is_told(text: str) -> None:
    user_profiles().write_text(text)
    with pytest.raises(ConfigError, match="is not a file of profiles"):
        all_profiles()
    assert profiles.user_profiles().read_text() == text


def test_a_profile_of_ones_own_wins() -> None:
    save_profile(user_profiles(), "small", "k2v2", "")
    assert CompressionConfig.parse("leankv:small").k_bits == 2


def test_profiles_that_name_each_other_are_told() -> None:
    save_profile(user_profiles(), "one", "k4v4,two", "")
    save_profile(user_profiles(), "two", "window=32,one", "")
    save_profile(user_profiles(), "three", "lean,window=128", "")
    with pytest.raises(ConfigError, match="profile 'one' names itself"):
        CompressionConfig.parse("leankv:one")
    assert CompressionConfig.parse("leankv:three").window == 128


def test_every_profile_is_understood() -> None:
    parsed: dict[str, Any] = {
        name: CompressionConfig.parse(f"leankv:{name}") for name in all_profiles()
    }
    assert parsed["lean"].policy == Budget(ratio=14, scope="model")
    assert parsed["document"].policy == Budget(ratio=7) and parsed["document"].scorer == Repeat()
    assert parsed["paper"].tiers == ((8, 4), (4, 2))
