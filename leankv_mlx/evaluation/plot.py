"""A report as a picture: compression against divergence and retrieval."""

from __future__ import annotations

from pathlib import Path

from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.lab import ArmResult, Report

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
    """Write the picture; its kind follows from the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    compressed = report.arms[1:]
    for axes, title in ((left, "mean KL divergence"), (right, "retrieval, mean score")):
        axes.set_title(title)
        axes.set_xlabel("times smaller than the uncompressed cache")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)
    left.plot([a.size.ratio for a in compressed], [_kld(a) for a in compressed], "o")
    left.set_yscale("log")
    for arm in compressed:
        left.annotate(arm.kv, (arm.size.ratio, _kld(arm)), (4, 4), textcoords="offset points")
    scored = [arm for arm in report.arms if arm.retrieval]
    right.set_ylim(-0.02, 1.05)
    right.plot([arm.size.ratio for arm in scored], [_score(arm) for arm in scored], "o")
    for arm in scored:
        right.annotate(arm.kv, (arm.size.ratio, _score(arm)), (4, 4), textcoords="offset points")
    figure.suptitle(f"{report.model}, context {report.settings.context}")
    figure.savefig(path)


def _kld(arm: ArmResult) -> float:
    return max(arm.fidelity.kld["mean"], 1e-9)  # the axis is logarithmic


def _score(arm: ArmResult) -> float:
    scores = [score for by_length in arm.retrieval.values() for score in by_length.values()]
    return sum(scores) / len(scores)
