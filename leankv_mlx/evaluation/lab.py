"""The quality lab behind `leankv eval`: what is run, in which order, and what comes out."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from leankv_mlx.config import UNCOMPRESSED
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.arms import Arm, Size, parse_arms, varied
from leankv_mlx.evaluation.fidelity import corpus, read_text, run_fidelity
from leankv_mlx.evaluation.metrics import Fidelity
from leankv_mlx.evaluation.questions import Answers, run_questions
from leankv_mlx.evaluation.retrieval import Retrieval, cells_of, run_retrieval
from leankv_mlx.evaluation.stress import STRESSES, Stress, injected
from leankv_mlx.evaluation.tasks import TASKS
from leankv_mlx.mlx_lm.loading import check_context, load

ABLATED = ("k4v4", "k3v3")
ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rotation=none", {"rotation": "none"}),
    ("center=off", {"center": False}),
    ("equalize=off", {"equalize": False}),
    ("rounding=rms", {"rounding": "rms"}),
)
"""Each part of the codec switched off alone: how the arm's name tells it, and its fields."""
STRESSED = ("leankv", "k8v8", "k8v4", "k3v3", "k4v4,equalize=off")

_SIZED_TOKENS = 256  # the keys of so many tokens tell how large a bias is in units of them


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        kv: settings to compare, as texts; none stands for the usual ones.
        tasks, lengths, samples: retrieval at these prompt lengths in tokens, so many prompts each.
        text: file whose text is scored; None for generated text.
        context, chunks: fidelity on so many chunks of so many tokens.
        documents: documents per length that ten questions each are asked about.
        ablate: also switch parts of the codec off, one at a time.
        stress: also inject outlier channels and key biases, into `kv` or STRESSED.
    """

    kv: tuple[str, ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (1024, 2048)
    samples: int = 11
    text: Path | None = None
    context: int = 1024
    chunks: int = 8
    documents: int = 0
    ablate: bool = False
    stress: bool = False


FULL = Settings()
FAST = Settings(tasks=("S2", "MK1"), lengths=(512,), samples=3, context=768, chunks=1)
"""About a minute for the demo model on two idle cores, two at most: a look, not a result."""


@dataclass(frozen=True)
class ArmResult:
    """What was measured of one arm; `retrieval` is empty where only fidelity was."""

    kv: str
    size: Size
    fidelity: Fidelity
    retrieval: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """The arm in the JSON document."""
        return {
            "kv": self.kv,
            "bits_per_element": self.size.bits_per_element,
            "body_bits": self.size.body_bits,
            "ratio": self.size.ratio,
            **self.fidelity.as_dict(),
            "retrieval": self.retrieval,
        }


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        arms: the uncompressed one first.
        retrieval: the scores of every prompt.
        questions: arm -> length -> answers to ten questions per document.
        windows: whether all arms keep the same exact tokens, as a comparison should.
        ablation: per setting, whole and with one part switched off.
        stress: arms per injection, the uncompressed one first.
    """

    model: str
    machine: str
    settings: Settings
    arms: list[ArmResult]
    retrieval: Retrieval
    questions: Mapping[str, Mapping[int, Answers]]
    windows: bool
    ablation: list[ArmResult]
    stress: list[tuple[Stress, list[ArmResult]]]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document; ablation and stress are in it where they were asked for."""
        document: dict[str, Any] = {
            "model": self.model,
            "machine": self.machine,
            "arms": [self._arm(arm) for arm in self.arms],
        }
        if self.ablation:
            document["ablation"] = [arm.as_dict() for arm in self.ablation]
        if self.stress:
            document["stress"] = [
                {"stress": stress.name, "arms": [arm.as_dict() for arm in arms]}
                for stress, arms in self.stress
            ]
        return document

    def _arm(self, arm: ArmResult) -> dict[str, Any]:
        """One arm: what was measured of the whole prompts, and the ratios behind the replies."""
        ratios = self.retrieval.ratios.get(arm.kv, {})
        found = arm.as_dict()
        found["retrieval_ratio"] = {f"{c.task} {c.length}": ratio for c, ratio in ratios.items()}
        found["pairs"] = {
            f"{c.task} {c.length}": self.retrieval.pairs(arm.kv, [c]).as_dict() for c in ratios
        }
        if any(self.questions.values()):
            answers = self.questions[arm.kv]
            found["questions"] = {str(length): a.as_dict() for length, a in answers.items()}
        return found


@dataclass(frozen=True)
class Progress:
    """Where a lab tells how far it is, in tokens read."""

    start: Callable[[int], None]
    advance: Callable[[str, int], None]


SILENT = Progress(lambda total: None, lambda what, tokens: None)


class Lab:
    """One run on one model.

    Raises:
        UsageError, ConfigError: the settings are not understood or do not fit the model.
        ModelError: the model cannot be loaded, or no layer of it can be compressed.
    """

    def __init__(self, model: str | None, settings: Settings) -> None:
        self.arms = parse_arms(settings.kv)
        self.stressed = parse_arms(settings.kv or STRESSED)
        self.cells = cells_of(settings.tasks, settings.lengths)
        self.settings = settings
        if settings.documents < 0:
            raise UsageError(f"--documents {settings.documents} is too small.")
        for name in ("samples", "context", "chunks"):
            if getattr(settings, name) < 1:
                raise UsageError(f"--{name} {getattr(settings, name)} is too small.")
        text = None if settings.text is None else read_text(settings.text)
        self.loaded = load(model)
        for length in (settings.context - 1, *settings.lengths):  # a chunk of text may fill it
            check_context(self.loaded.config, length, 1)
        self.corpus = corpus(self.loaded, text, settings.context, settings.chunks)

    @property
    def work(self) -> int:
        """Tokens to read in all."""
        settings = self.settings
        retrieval = sum(cell.length for cell in self.cells) * settings.samples * len(self.arms)
        retrieval += sum(settings.lengths) * settings.documents * len(self.arms)
        fidelity = len(self.arms)
        if settings.ablate:
            fidelity += len(ablation_arms())
        if settings.stress:
            fidelity += len(STRESSES) * len(self.stressed)
        return fidelity * self.corpus.work + retrieval

    def run(self, progress: Progress = SILENT) -> Report:
        """Measure everything that the settings ask for."""
        settings = self.settings
        progress.start(self.work)
        arms = self._fidelity(self.arms, progress)
        retrieval = run_retrieval(
            self.loaded, self.arms, self.cells, settings.samples, progress.advance
        )
        questions = run_questions(
            self.loaded, self.arms, settings.lengths, settings.documents, progress.advance
        )
        ablation = self._fidelity(ablation_arms(), progress)[1:] if settings.ablate else []
        stress = [self._stress(one, progress) for one in STRESSES] if settings.stress else []
        configs = [arm.config for arm in self.arms if arm.config]
        return Report(
            model=self.loaded.path.name,
            machine=machine(),
            settings=settings,
            arms=[replace(arm, retrieval=retrieval.means(arm.kv)) for arm in arms],
            retrieval=retrieval,
            questions=questions,
            windows=len({(c.window, c.sink_tokens) for c in configs}) <= 1,
            ablation=ablation,
            stress=stress,
        )

    def _fidelity(self, arms: Sequence[Arm], progress: Progress) -> list[ArmResult]:
        sizes: dict[str, Size] = {}
        found = run_fidelity(self.loaded, arms, self.corpus, progress.advance, sizes=sizes)
        return [ArmResult(arm.kv, sizes[arm.kv], found[arm.kv], {}) for arm in arms]

    def _stress(self, stress: Stress, progress: Progress) -> tuple[Stress, list[ArmResult]]:
        def advance(what: str, tokens: int) -> None:
            progress.advance(f"{stress.name}, {what}", tokens)

        sample = self.corpus.chunks[0].tokens[:_SIZED_TOKENS]
        with injected(self.loaded.model, stress, sample):
            return stress, self._fidelity(self.stressed, replace(progress, advance=advance))


def ablation_arms() -> list[Arm]:
    """The uncompressed arm, then each ablated setting whole and without one part."""
    arms = [Arm.parse(UNCOMPRESSED)]
    for kv in ABLATED:
        whole = Arm.parse(kv)
        arms += [whole, *(varied(whole, name, **fields) for name, fields in ABLATIONS)]
    return arms


def machine() -> str:
    """What ran this, for a reader who compares figures."""
    device = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, mlx {version('mlx')} "
        f"on {device}"
    )
