"""`leankv models`: the models of models.toml, and a GGUF file made into a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


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
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("hub id", overflow="fold")
    for title in ("layers", "sliding", "KV heads", "head dim", "context", "weights"):
        table.add_column(title, justify="right")
    table.add_column("profile")
    for entry in entries:
        sliding = f"{entry.sliding_layers} x {entry.window}" if entry.sliding_layers else "-"
        table.add_row(
            entry.name,
            entry.repo or "ships with the package",
            str(entry.full_layers),
            sliding,
            str(entry.kv_heads),
            str(entry.head_dim),
            f"{entry.context:,}",
            f"{entry.weights / 1e9:.2f} GB",
            entry.kv,
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)
    console.print(
        "layers: with keys and values that grow with the context; sliding: layers x tokens they "
        "keep. leankv plan NAME --memory 16GB says how long a context fits."
    )


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
        typer.echo(line)
    typer.echo(f"{folder} is ready: leankv generate --model {folder}")
