"""`leankv calibrate`: find a setting for a model within limits, and keep it as a profile.

With `--sparse` see `sparsify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli.console import show
from leankv_mlx.cli.eval import parsed_lengths, parsed_tasks, progress_bar
from leankv_mlx.cli.reading import LastJson, Model
from leankv_mlx.cli.sparsify import Request, sparsify
from leankv_mlx.errors import LeanKVError, UsageError
from leankv_mlx.terminal import say_json

if TYPE_CHECKING:
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.allocation import Allocation
    from leankv_mlx.evaluation.calibration import Candidate
    from leankv_mlx.evaluation.lab import Lab, Progress, Settings
    from leankv_mlx.evaluation.tables import Grid

_SWEPT = "leankv:policy=budget,scope=model,window=32"

_Name = Annotated[str, typer.Argument(help="Name of the profile: --kv leankv:NAME takes it.")]
_Kv = Annotated[
    str | None,
    typer.Option(
        help="What to start from; its policy says what is swept.",
        show_default="leankv:policy=budget,scope=model,window=32; leankv with --sparse",
    ),
]
_Bits = Annotated[
    str | None,
    typer.Option(
        help="First give each layer and side its own bits, so many on average. With a --kv that "
        "keeps all tokens that is all, and several (2,2.9,3.8) make several profiles."
    ),
]
_Sparse = Annotated[
    str | None,
    typer.Option(
        help="Instead, find the input channels that decode steps can leave out: shares of the "
        "weights, such as 0.25,0.4."
    ),
]
_Limit = Annotated[
    float,
    typer.Option(help="With --sparse, largest loss of perplexity, as a share of it."),
]
_By = Annotated[
    str,
    typer.Option(
        help="With --sparse, what channels are judged by: teal (their size) or wina (that times "
        "the norm of their weights)."
    ),
]
_Spread = Annotated[
    str,
    typer.Option(
        help="With --sparse, which inputs leave out how much: uniform, block (by what the model "
        "loses, every layer alike) or model (by that alone)."
    ),
]
_Kld = Annotated[
    float, typer.Option(help="Largest mean KL divergence from the uncompressed model, in nats.")
]
_Points = Annotated[float, typer.Option(help="Largest loss of retrieval, in points of 100.")]
_Tasks = Annotated[str, typer.Option(help="Retrieval tasks, or none.")]
_Lengths = Annotated[str, typer.Option(help="Prompt lengths of retrieval in tokens.")]
_Samples = Annotated[int, typer.Option(help="Prompts per task and length.")]
_Text = Annotated[
    Path | None, typer.Option(help="Text file for the divergence (default: generated text).")
]
_Context = Annotated[int, typer.Option(help="Tokens per chunk of text; half are scored.")]
_Chunks = Annotated[int, typer.Option(help="Chunks of text.")]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="TOML file (default: your own profiles)."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("calibrate")(calibrate)


def calibrate(
    name: _Name,
    model: Model = None,
    kv: _Kv = None,
    bits: _Bits = None,
    sparse: _Sparse = None,
    limit: _Limit = 0.01,
    by: _By = "wina",
    spread: _Spread = "model",
    kld: _Kld = 0.02,
    points: _Points = 2.0,
    tasks: _Tasks = "S2,MK1",
    lengths: _Lengths = "2048",
    samples: _Samples = 6,
    text: _Text = None,
    context: _Context = 2048,
    chunks: _Chunks = 2,
    output: _Output = None,
    as_json: LastJson = False,
) -> None:
    """Find the smallest cache of a model that stays within limits, or the most input channels that
    it can do without; keep it as a profile."""
    if sparse is not None:
        if bits is not None:
            raise UsageError("--bits and --sparse are two calibrations; give one of them.")
        request = Request(
            name, model, kv or "leankv", sparse, limit, by, spread, text, context, chunks, output
        )
        sparsify(request, as_json)
        return
    from leankv_mlx.evaluation.lab import Settings

    settings = Settings(
        kv=(kv or _SWEPT,), tasks=parsed_tasks(tasks) or (), lengths=parsed_lengths(lengths) or (),
        samples=samples, text=text, context=context, chunks=chunks,
    )  # fmt: skip
    limits = None if bits is None else _parsed_bits(bits)
    _smallest(name, model, settings, limits, kld, points, output, as_json)


def _parsed_bits(text: str) -> list[float]:
    """The value of --bits.

    Raises:
        UsageError: it is not understood.
    """
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--bits {text} is not understood; use for example 2.9.") from None


def _smallest(
    name: str,
    model: str | None,
    settings: Settings,
    bits: list[float] | None,
    kld: float,
    points: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Find the smallest cache that stays within limits."""
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.calibration import Limits, candidates, measured, sweep
    from leankv_mlx.evaluation.lab import Lab, machine
    from leankv_mlx.policies import KeepAll
    from leankv_mlx.profiles import check_name, save_profile, user_profiles

    check_name(name)
    base = CompressionConfig.parse(settings.kv[0])
    if bits is not None and isinstance(base.policy, KeepAll):
        _bits_of_layers(name, Lab(model, settings), base, bits, output, as_json)
        return
    candidates(base)  # a policy without anything to sweep is told before the model is loaded
    if bits is not None and len(bits) > 1:
        raise UsageError("several --bits go with a --kv that keeps all tokens; give one.")
    lab = Lab(model, settings)
    allocation = None
    with progress_bar() as progress:
        if bits is not None:
            (allocation,) = _allocated(lab, base, bits, progress)
            base = replace(base, layer_bits=allocation.bits)
        found = sweep(
            lab.loaded, candidates(base), Limits(kld, points), lab.corpus, lab.cells,
            settings.samples, progress.advance,
        )  # fmt: skip
    show(_tables(allocation, found), machine(), to_stderr=as_json)
    best = _best(measured(found), settings.context, kld, points)
    about = f"calibrated on {lab.loaded.path.name}: {best.size.ratio:.1f} times smaller after "
    about += f"{settings.context // 2} tokens, mean KL divergence {best.kld:.4f}"
    target = output or user_profiles()
    save_profile(target, name, best.kv, about)
    typer.echo(f"wrote profile {name} to {target}: leankv:{best.kv}", err=as_json)
    if as_json:
        say_json(_document(name, allocation, found, best), indent=None)


def _bits_of_layers(
    name: str,
    lab: Lab,
    base: CompressionConfig,
    limits: list[float],
    output: Path | None,
    as_json: bool,
) -> None:
    """Give layers their bits, and keep the settings as profiles."""
    from leankv_mlx.evaluation.lab import machine
    from leankv_mlx.profiles import save_profile, user_profiles

    with progress_bar() as progress:
        allocations = _allocated(lab, base, limits, progress)
    show([_bits_table(each) for each in allocations], machine(), to_stderr=as_json)
    target, written = output or user_profiles(), []
    for limit, each in zip(limits, allocations, strict=True):
        called = name if len(limits) == 1 else f"{name}-{limit:g}".replace(".", "_")
        kv = replace(base, layer_bits=each.bits).spec().removeprefix("leankv:")
        about = f"bits of layers for {lab.loaded.path.name}: {each.mean:.2f} in the mean, mean KL "
        save_profile(target, called, kv, f"{about}divergence {each.kld:.4f}")
        typer.echo(f"wrote profile {called} to {target}", err=as_json)
        written.append({"profile": called, "kv": kv, **_bits_document(each)})
    if as_json:
        say_json({"profiles": written}, indent=None)


def _allocated(
    lab: Lab, base: CompressionConfig, limits: list[float], progress: Progress
) -> list[Allocation]:
    """Bits of the layers of a model, for each limit."""
    from leankv_mlx.evaluation.allocation import allocate
    from leankv_mlx.mlx_lm.attachment import attach

    with attach(lab.loaded.model, base) as attachment:
        layers = attachment.compressed_layers
    return allocate(lab.loaded, base, layers, limits, lab.corpus, progress.advance)


class _NothingWithinLimits(LeanKVError):
    """No candidate was good enough."""


def _best(told: Sequence[Candidate], context: int, kld: float, points: float) -> Candidate:
    """The smallest within the limits, of those of which something was measured.

    Raises:
        _NothingWithinLimits: there is none.
    """
    if not told:
        raise _NothingWithinLimits(
            f"no candidate dropped a token at --context {context}: nothing was measured of what "
            "they lose; use a longer --context, 4096 or more."
        )
    best = max((c for c in told if c.within), key=lambda c: c.size.ratio, default=None)
    if best is None:
        raise _NothingWithinLimits(
            f"no candidate stays within --kld {kld:g} and --points {points:g}; raise them, or "
            "start from more bits (--kv leankv:k8v4,policy=...)."
        )
    return best


def _document(
    name: str, allocation: Allocation | None, found: list[Candidate], best: Candidate
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "profile": name,
        "kv": best.kv,
        "candidates": [
            {
                "kv": c.kv,
                "ratio": c.size.ratio,
                "kld": c.kld,
                "retrieval": c.retrieval,
                "within": c.within,
            }
            for c in found
        ],
    }
    return document | (_bits_document(allocation) if allocation else {})


def _bits_document(allocation: Allocation) -> dict[str, Any]:
    (k, v), kld = allocation.uniform
    return {
        "layer_bits": [list(pair) for pair in allocation.bits],
        "layer_bits_kld": allocation.kld,
        "uniform": {"k_bits": k, "v_bits": v, "kld": kld},
    }


def _bits_table(allocation: Allocation) -> Grid:
    from leankv_mlx.evaluation.tables import Grid

    (k, v), kld = allocation.uniform
    rows = [[str(i), str(a), str(b)] for i, (a, b) in enumerate(allocation.bits)]
    note = f"mean KL divergence {allocation.kld:.5f}; {kld:.5f} with k{k}v{v} in all layers"
    title = f"Bits of each layer, {allocation.mean:.2f} in the mean"
    return Grid(title, ("layer", "keys", "values"), rows, note)


def _tables(allocation: Allocation | None, found: list[Candidate]) -> list[Grid]:
    from leankv_mlx.evaluation.tables import Grid

    grids = [_bits_table(allocation)] if allocation else []
    rows = [
        [
            c.kv,
            f"{c.size.ratio:.2f}",
            f"{c.kld:.5f}",
            "-" if c.retrieval is None else f"{c.retrieval:.2f}",
            "yes" if c.within else "no",
        ]
        for c in found
    ]
    header = ("kv", "ratio", "KLD mean", "retrieval", "within limits")
    return [*grids, Grid("Candidates", header, rows)]
