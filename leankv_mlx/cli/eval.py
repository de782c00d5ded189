"""`leankv eval`: fidelity and retrieval of cache settings, measured through the real cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli.console import console, show
from leankv_mlx.cli.reading import LastJson, Model
from leankv_mlx.errors import UsageError
from leankv_mlx.terminal import say_json

if TYPE_CHECKING:
    from leankv_mlx.evaluation.lab import Progress, Settings


_Kv = Annotated[
    list[str] | None,
    typer.Option(
        help="Setting to measure, such as k4v3 or leankv:k4v4,window=128; repeat to compare. "
        "The uncompressed cache (none) is always measured too.",
        show_default="k8v8 k8v4 k4v4 k4v3 k3v3 k3v2 k2v2",
    ),
]
_Tasks = Annotated[
    str | None,
    typer.Option(help="Retrieval tasks, such as S2,MK1; or none.", show_default="all eight"),
]
_Lengths = Annotated[
    str | None,
    typer.Option(help="Prompt lengths of retrieval in tokens.", show_default="1024,2048"),
]
_Samples = Annotated[
    int | None, typer.Option(help="Prompts per task and length.", show_default="11")
]
_Text = Annotated[
    Path | None, typer.Option(help="Text file for fidelity (default: generated text).")
]
_Context = Annotated[
    int | None,
    typer.Option(help="Tokens per chunk of text; half are scored.", show_default="1024"),
]
_Chunks = Annotated[int | None, typer.Option(help="Chunks of text.", show_default="8")]
_Documents = Annotated[
    int | None,
    typer.Option(
        help="Documents per length that ten questions each are asked about.", show_default="0"
    ),
]
_Fast = Annotated[bool, typer.Option("--fast", help="Small settings: two minutes on two cores.")]
_Ablate = Annotated[
    bool, typer.Option("--ablate", help="Also switch off rotation, centering, scale search.")
]
_Stress = Annotated[
    bool, typer.Option("--stress", help="Also inject outlier channels and key biases.")
]
_Plot = Annotated[
    Path | None, typer.Option(help="Write a picture (.svg or .png); needs the extra plot.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("eval")(evaluate)


def evaluate(
    model: Model = None,
    kv: _Kv = None,
    tasks: _Tasks = None,
    lengths: _Lengths = None,
    samples: _Samples = None,
    text: _Text = None,
    context: _Context = None,
    chunks: _Chunks = None,
    documents: _Documents = None,
    fast: _Fast = False,
    ablate: _Ablate = False,
    stress: _Stress = False,
    plot: _Plot = None,
    as_json: LastJson = False,
) -> None:
    """Measure what compression does to a model's quality."""
    given: dict[str, Any] = {
        "kv": tuple(kv) if kv else None,
        "tasks": parsed_tasks(tasks),
        "lengths": parsed_lengths(lengths),
        "samples": samples,
        "text": text,
        "context": context,
        "chunks": chunks,
        "documents": documents,
        "ablate": ablate,
        "stress": stress,
    }
    from leankv_mlx.evaluation.lab import FAST, FULL

    settings = replace(
        FAST if fast else FULL, **{name: v for name, v in given.items() if v is not None}
    )
    _run(model, settings, plot, as_json)


def parsed_tasks(text: str | None) -> tuple[str, ...] | None:
    """The value of --tasks."""
    if text is None or text.strip().lower() == "none":
        return None if text is None else ()
    return tuple(dict.fromkeys(part.strip().upper() for part in text.split(",") if part.strip()))


def parsed_lengths(text: str | None) -> tuple[int, ...] | None:
    """The value of --lengths.

    Raises:
        UsageError: it is not understood.
    """
    if text is None:
        return None
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(
            f"--lengths {text} is not understood; use for example 1024,2048."
        ) from None
    if min(found) < 1:
        raise UsageError(f"--lengths {text} is not understood; lengths are above 0.")
    return found


def _run(model: str | None, settings: Settings, picture: Path | None, as_json: bool) -> None:
    from leankv_mlx.evaluation.lab import Lab
    from leankv_mlx.evaluation.plot import check_plot, plot
    from leankv_mlx.evaluation.tables import tables

    if picture is not None:
        check_plot(picture)
    lab = Lab(model, settings)
    with progress_bar() as progress:
        report = lab.run(progress)
    if picture is not None:
        plot(report, picture)
    show(tables(report), report.machine, to_stderr=as_json)
    if as_json:
        say_json(report.as_dict(), indent=None)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from leankv_mlx.evaluation import lab

    columns: list[Any] = [
        BarColumn(), "{task.percentage:3.0f}%", TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    ]  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lab.Progress(
            start=lambda total: bar.update(task, total=total),
            advance=lambda what, tokens: bar.update(task, description=what, advance=tokens),
        )
