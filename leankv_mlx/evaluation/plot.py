"""A report as a picture: compression against divergence and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.evaluation.lab import ArmResult, Report
from leankv_mlx.policies import Budget, Threshold

SUFFIXES = (".svg", ".png")


def check_plot(path: Path) -> None:
    """Fail before anything slow.

    Raises:
        UsageError: matplotlib is missing, or the file's kind or folder is not right.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: use a name that ends in {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib; install it with: pip install 'leankv-mlx[plot]'."
        ) from error


def plot(report: Report, path: Path) -> None:
    """Write the picture, one line per policy; its kind follows from the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title in ((left, "mean KL divergence"), (right, "retrieval, mean score")):
        axes.set_title(title)
        axes.set_xlabel("times smaller than the uncompressed cache")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)
    left.set_yscale("log")
    right.set_ylim(-0.02, 1.05)
    for policy, arms in _by_policy(report.arms[1:]).items():
        _line(left, policy, [(a.size.ratio, _kld(a), _label(a)) for a in arms])
        scored = [(_ratio(report, a), _score(a), _label(a)) for a in arms if a.retrieval]
        _line(right, policy, scored)
    if report.arms[0].retrieval:
        right.axhline(_score(report.arms[0]), color="gray", linestyle=":", label="uncompressed")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(f"{report.model}, context {report.settings.context}")
    figure.savefig(path)


def _line(axes: Any, policy: str, points: list[tuple[float, float, str]]) -> None:
    """One policy's points (x, y, what to write beside it), joined in the order of x."""
    if not points:
        return
    points = sorted(points)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=policy)
    for x, y, label in points:
        axes.annotate(label, (x, y), (4, 4), textcoords="offset points", fontsize="small")


def _by_policy(arms: list[ArmResult]) -> dict[str, list[ArmResult]]:
    groups: dict[str, list[ArmResult]] = {}
    for arm in arms:
        groups.setdefault(_config(arm).policy.name, []).append(arm)
    return groups


def _config(arm: ArmResult) -> CompressionConfig:
    config = Arm.parse(arm.kv).config
    assert config is not None  # the uncompressed arm is no point
    return config


def _label(arm: ArmResult) -> str:
    """What tells an arm from the others of its line."""
    policy = _config(arm).policy
    if isinstance(policy, Budget):
        return f"{policy.ratio:g}"
    if isinstance(policy, Threshold):
        return f"{policy.alpha_high:g}/{policy.alpha_low:g}"
    return "" if policy.drops else arm.kv


def _ratio(report: Report, arm: ArmResult) -> float:
    """Behind the replies, mean over the cells."""
    ratios = report.retrieval.ratios[arm.kv].values()
    return sum(ratios) / len(ratios)


def _kld(arm: ArmResult) -> float:
    return max(arm.fidelity.kld["mean"], 1e-9)  # the axis is logarithmic


def _score(arm: ArmResult) -> float:
    scores = [score for by_length in arm.retrieval.values() for score in by_length.values()]
    return sum(scores) / len(scores)
