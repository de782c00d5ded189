"""`leankv models`: the models of models.toml, and a GGUF file made into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from leankv_mlx.cli.console import is_narrow, list_console, list_table
from leankv_mlx.terminal import say, say_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from leankv_mlx.engine.catalogue import CatalogueEntry


class _DType(Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    group = typer.Typer(invoke_without_command=True, add_completion=False)
    group.callback()(models)
    group.command("import")(import_file)
    app.add_typer(group, name="models")


def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List models that run with mlx-lm, and what their KV cache costs."""
    if context.invoked_subcommand is not None:
        return
    from leankv_mlx.engine.catalogue import catalogue

    entries = catalogue()
    if as_json:
        say_json([asdict(entry) for entry in entries])
        return
    out = list_console()
    out.print(_narrow(entries, out) if is_narrow(out) else _wide(entries, out))
    if not is_narrow(out):
        out.print(
            "layers: with keys and values that grow with the context; sliding: layers x tokens "
            "they keep."
        )
    out.print("leankv plan NAME --memory 16GB says how long a context fits.")


def _wide(entries: Sequence[CatalogueEntry], out: Console) -> Table:
    table = list_table(out)
    table.add_column("name", no_wrap=True)
    table.add_column("hub id", overflow="fold")
    for title in ("layers", "sliding", "KV heads", "head dim", "context", "weights"):
        table.add_column(title, justify="right")
    table.add_column("profile")
    for entry in entries:
        sliding = f"{entry.sliding_layers} x {entry.window}" if entry.sliding_layers else "-"
        table.add_row(
            entry.name,
            _hub_id(entry),
            str(entry.full_layers),
            sliding,
            str(entry.kv_heads),
            str(entry.head_dim),
            *_figures(entry),
        )
    return table


def _narrow(entries: Sequence[CatalogueEntry], out: Console) -> Table:
    """Two lines for each model; the rest is in --json."""
    table = list_table(out)
    table.add_column("model", overflow="fold")
    for title in ("context", "weights"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("profile")
    for entry in entries:
        table.add_row(Text.assemble(entry.name, "\n", (_hub_id(entry), "dim")), *_figures(entry))
    return table


def _hub_id(entry: CatalogueEntry) -> str:
    return entry.repo or "ships with the package"


def _figures(entry: CatalogueEntry) -> tuple[str, str, str]:
    """Context, weights and profile."""
    return f"{entry.context:,}", f"{entry.weights / 1e9:.2f} GB", entry.kv


def import_file(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Does not exist yet, or is empty.")],
    dtype: Annotated[
        _DType | None,
        typer.Option(help="Of scales and dense weights (default: what holds the file's exactly)."),
    ] = None,
) -> None:
    """Write the model of a GGUF file into a folder that mlx-lm loads."""
    from leankv_mlx.errors import UsageError
    from leankv_mlx.models.conversion import convert, inexact_line

    file, folder = file.expanduser(), folder.expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; name a new folder.")
    convert(file, folder, dtype.value if dtype else None)
    if line := inexact_line(file, folder):
        say(line)
    say(f"{folder} is ready: leankv generate --model {folder}")
