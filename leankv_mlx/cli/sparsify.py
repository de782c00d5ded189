"""`leankv calibrate --sparse`: which input channels a model can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import typer

from leankv_mlx.cli.console import show
from leankv_mlx.cli.eval import progress_bar
from leankv_mlx.errors import LeanKVError, UsageError
from leankv_mlx.settings import Sparse, check_sparse, settings_of
from leankv_mlx.terminal import say_json

if TYPE_CHECKING:
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.lab import Lab
    from leankv_mlx.evaluation.sparsifying import Spread, Trial
    from leankv_mlx.evaluation.tables import Grid
    from leankv_mlx.projections.sparsity import By, Thresholds


@dataclass(frozen=True)
class Request:
    """What the options say.

    Attributes:
        name: of the profile and of the thresholds.
        shares: as text.
        limit: largest loss of perplexity, as a share of it.
        by, spread: as in `evaluation.sparsifying`.
        text, context, chunks: chunks that thresholds are found on, and as many that are scored.
        output: file of the profile; None for the user's own.
    """

    name: str
    model: str | None
    kv: str
    shares: str
    limit: float
    by: str
    spread: str
    text: Path | None
    context: int
    chunks: int
    output: Path | None


class _NothingWithinLimit(LeanKVError):
    """Every share costs too much."""


def sparsify(request: Request, as_json: bool) -> None:
    """Calibrate a model; keep its thresholds, and a profile with the largest share that is within
    the limit.

    Raises:
        UsageError, ConfigError: the options are not understood.
        CalibrationError: the model has nothing that can be left out.
        ModelError: it cannot be loaded.
    """
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.lab import Lab, Settings, machine
    from leankv_mlx.evaluation.sparsifying import Spread
    from leankv_mlx.profiles import check_name
    from leankv_mlx.projections.sparsity import By

    check_name(request.name)
    base = CompressionConfig.parse(request.kv)
    shares = parsed_shares(request.shares)
    _check_word("--by", request.by, get_args(By))
    _check_word("--spread", request.spread, get_args(Spread))
    settings = Settings(
        kv=(request.kv,), tasks=(), lengths=(), text=request.text, context=request.context,
        chunks=2 * request.chunks,
    )  # fmt: skip
    lab = Lab(request.model, settings)
    found, trials = _measured(request, lab, base, shares)
    show([_table(request, lab, trials)], machine(), to_stderr=as_json)
    within = [trial.share for trial in trials if trial.loss <= request.limit]
    if not within:
        raise _NothingWithinLimit(
            f"no share stays within --limit {request.limit:g} of perplexity; "
            "give smaller ones, or raise it."
        )
    best = replace(base, sparse=Sparse(max(within), request.name)).spec()
    _write(request, found.only(within), best, trials, as_json)
    if as_json:
        document = {"profile": request.name, "kv": best, "by": request.by,
                    "spread": request.spread, "within": within,
                    "trials": [asdict(trial) for trial in trials]}  # fmt: skip
        say_json(document, indent=None)


def _measured(
    request: Request, lab: Lab, base: CompressionConfig, shares: list[float]
) -> tuple[Thresholds, list[Trial]]:
    """Thresholds from the first half of the chunks, and what they cost on the others."""
    from leankv_mlx.evaluation.sparsifying import thresholds, tried
    from leankv_mlx.mlx_lm.loading import fingerprint

    model, path = lab.loaded.model, lab.loaded.path
    half = len(lab.corpus.chunks) // 2
    if not half:
        raise UsageError(
            f"the text has one chunk of {request.context} tokens, and thresholds are tried on "
            "another one than they are found on; give a longer text or a smaller --context."
        )
    by, spread = cast("By", request.by), cast("Spread", request.spread)
    texts, scored = lab.corpus.part(0, half), lab.corpus.part(half)
    with progress_bar() as progress:

        def look(what: str, tokens: int) -> None:
            progress.advance(what, 0)  # how much there is to see is not known yet

        found = thresholds(model, by, spread, shares, texts.chunks, look)
        found = replace(found, model=fingerprint(path), name=path.name)
        progress.start((2 + len(shares)) * scored.work)
        return found, tried(lab.loaded, request.name, base, found, scored, progress.advance)


def _write(
    request: Request, found: Thresholds, kv: str, trials: list[Trial], as_json: bool
) -> None:
    """The thresholds, and the profile that names them."""
    from leankv_mlx.profiles import save_profile, user_profiles
    from leankv_mlx.projections.sparsity import save

    best = next(trial for trial in trials if trial.share == found.shares[-1])
    about = (
        f"calibrated on {found.name}: leaves out {best.share:.0%} of the layers' weights, "
        f"perplexity {best.loss:+.2%}, mean KL divergence {best.kld:.4f}"
    )
    path, target = save(found, request.name), request.output or user_profiles()
    save_profile(target, request.name, kv.removeprefix("leankv:"), about)
    listed = ", ".join(f"{share:g}" for share in found.shares)
    typer.echo(f"wrote thresholds for {listed} to {path}", err=as_json)
    typer.echo(f"wrote profile {request.name} to {target}: {kv}", err=as_json)


def _table(request: Request, lab: Lab, trials: list[Trial]) -> Grid:
    from leankv_mlx.evaluation.tables import Grid

    rows = [
        [
            f"{trial.share:g}",
            f"{trial.read:.1%}",
            f"{trial.ppl:.3f}",
            f"{trial.loss:+.2%}",
            f"{trial.kld:.5f}",
            "yes" if trial.loss <= request.limit else "no",
        ]
        for trial in trials
    ]
    note = (
        f"{request.by}, {request.spread}; the loss is beside {request.kv} with all channels, the "
        "divergence from the uncompressed model; weights are those of the layers"
    )
    header = ("sparse", "weights read", "ppl", "loss", "KLD mean", "within limit")
    return Grid(f"Activation sparsity, {lab.loaded.path.name}", header, rows, note)


def parsed_shares(text: str) -> list[float]:
    """The value of --sparse, ascending.

    Raises:
        UsageError: it is not understood.
    """
    from leankv_mlx.config import CompressionConfig

    setting = settings_of(CompressionConfig)["sparse"]
    found = [setting.read(part) for part in text.split(",")]
    for sparse in found:
        check_sparse(sparse)
        if sparse.name or not sparse:
            raise UsageError(f"--sparse {text} is not understood; use shares such as 0.25,0.4.")
    return sorted({sparse.share for sparse in found})


def _check_word(option: str, word: str, words: Sequence[str]) -> None:
    if word not in words:
        raise UsageError(f"{option} {word} is unknown; use one of {', '.join(words)}.")
