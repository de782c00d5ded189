"""A report as tables of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.evaluation.lab import ArmResult, Report
from leankv_mlx.evaluation.questions import QUESTIONS
from leankv_mlx.evaluation.retrieval import Cell
from leankv_mlx.evaluation.stress import Stress


@dataclass(frozen=True)
class Grid:
    """One table; the first column is text, the others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(report: Report) -> list[Grid]:
    """Every table that the report has something for."""
    grids = [_fidelity(report)]
    if report.settings.tasks:
        grids += [_retrieval(report), _pairs(report)]
    if report.settings.documents:
        grids.append(_questions(report))
    if report.ablation:
        note = "one part of the codec switched off at a time"
        grids.append(Grid("Ablation", *_columns(report.ablation), note))
    if report.stress:
        grids.append(_stress(report.stress))
    return grids


def _fidelity(report: Report) -> Grid:
    settings = report.settings
    base = report.arms[0].fidelity
    chunks = base.tokens // (settings.context - settings.context // 2)
    note = (
        f"{base.tokens} tokens scored in {chunks} contexts of {settings.context}; float32; "
        f"perplexity without compression {base.ppl:.3f}, {base.bits_per_byte:.3f} bits per byte; "
        "bits: of everything kept, body bits: of codes and scales; ±: standard error, "
        + ("by bootstrap over the contexts" if chunks > 1 else "one context's tokens independent")
    )
    if not report.windows:
        note += "; arms differ in window or sink tokens, so they do not compare only their codecs"
    if any(arm.drops for arm in map(Arm.parse, (arm.kv for arm in report.arms))):
        note += (
            f"; bits and ratio of a policy are those behind a prompt of {settings.context // 2} "
            "tokens"
        )
    return Grid(f"Fidelity, {report.model}", *_columns(report.arms), note)


def _columns(arms: Sequence[ArmResult]) -> tuple[Sequence[str], list[list[str]]]:
    header = ("kv", "bits", "body bits", "ratio", "KLD mean", "p50", "p90", "p99", "p99.9", "max",
              "top-1 %", "ppl", "ln ratio")  # fmt: skip
    rows = []
    for arm in arms:
        found = arm.fidelity
        rows.append([
            arm.kv,
            f"{arm.size.bits_per_element:.2f}",
            f"{arm.size.body_bits:.2f}" if arm.size.body_bits else "",
            f"{arm.size.ratio:.2f}",
            f"{found.kld['mean']:.5f} ±{found.kld_error:.5f}",
            *(f"{found.kld[name]:.5f}" for name in ("p50", "p90", "p99", "p999", "max")),
            f"{100 * found.top1:.1f} ±{100 * found.top1_error:.1f}",
            f"{found.ppl:.3f}",
            f"{found.ln_ratio:+.4f} ±{found.ln_ratio_error:.4f}",
        ])  # fmt: skip
    return header, rows


def _retrieval(report: Report) -> Grid:
    cells = [(task, length) for task, by in report.arms[0].retrieval.items() for length in by]
    rows = []
    for arm in report.arms:
        row = [arm.kv]
        for task, length in cells:
            ratio = report.retrieval.ratios[arm.kv][Cell(task, int(length))]
            row.append(f"{arm.retrieval[task][length]:.2f} ({ratio:.1f}x)")
        rows.append(row)
    note = (
        f"mean score of {report.settings.samples} prompts per cell, and how many times smaller "
        "than fp16 the cache was behind the reply"
    )
    header = ["kv", *(f"{task} {length}" for task, length in cells)]
    return Grid("Retrieval", header, rows, note)


def _questions(report: Report) -> Grid:
    header = ["kv"]
    for length in report.settings.lengths:
        header += [f"{length}", "first", "ratio"]
    rows = []
    for arm in report.arms:
        row = [arm.kv]
        for a in report.questions[arm.kv].values():
            row += [f"{a.score:.2f}", f"{a.first:.2f}", f"{a.ratio:.1f}"]
        rows.append(row)
    note = f"mean score of {report.settings.documents} documents, and of their first question alone"
    return Grid(f"{QUESTIONS} questions per document", header, rows, note)


def _pairs(report: Report) -> Grid:
    """Every arm beside the uncompressed one, on the same prompts."""
    header = ("kv", "both", "only uncompressed", "only this", "neither", "p")
    rows = []
    for arm in report.arms[1:]:
        pairs = report.retrieval.pairs(arm.kv, [*report.retrieval.scores[arm.kv]])
        counts = (pairs.both, pairs.only_base, pairs.only_arm, pairs.neither)
        rows.append([arm.kv, *map(str, counts), f"{pairs.p_value:.2f}"])
    note = "all cells; p: McNemar's exact test of whether one of the two answers more"
    return Grid("Prompts answered fully, beside the uncompressed cache", header, rows, note)


def _stress(stress: Sequence[tuple[Stress, Sequence[ArmResult]]]) -> Grid:
    """Mean KL divergence of every arm under every injection."""
    header = ("kv", "body bits", *(one.name for one, _ in stress), "worst")
    rows = []
    for i, arm in enumerate(stress[0][1][1:], 1):
        klds = [arms[i].fidelity.kld["mean"] for _, arms in stress]
        rows.append([
            arm.kv, f"{arm.size.body_bits:.2f}", *(f"{kld:.5f}" for kld in (*klds, max(klds))),
        ])  # fmt: skip
    return Grid("Stress, mean KLD", header, rows, "each beside the same model without compression")
