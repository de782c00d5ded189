"""`leankv models`: the models of models.toml."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("models")(models)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List models that run with mlx-lm, and what their KV cache costs."""
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
