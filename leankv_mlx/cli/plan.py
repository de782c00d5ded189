"""`leankv plan`: how long a context fits a machine's memory."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from leankv_mlx.errors import UsageError

if TYPE_CHECKING:
    from leankv_mlx.engine.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("plan")(plan)


def plan(
    model: Annotated[str, typer.Argument(help="A name or hub id of leankv models.")],
    memory: Annotated[str, typer.Option(help="Memory of the machine.")] = "16GB",
    reserve: Annotated[
        str, typer.Option(help="What the system and activations get of it.")
    ] = "2GB",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Say the longest context with the uncompressed cache and with each profile."""
    from leankv_mlx.engine import catalogue
    from leankv_mlx.engine import plan as planning
    from leankv_mlx.sizes import parse_bytes

    entry = catalogue.find(model)
    found = planning.plan(entry, parse_bytes(memory), parse_bytes(reserve))
    if found.kv_budget <= 0:
        raise UsageError(
            f"{entry.name} has {entry.weights / 1e9:.2f} GB of weights; with {reserve} reserved "
            f"nothing of {memory} is left for a KV cache."
        )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        _show(found)


def _show(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    entry = found.model
    table = Table()
    table.add_column("profile")
    table.add_column("kv")
    for title in ("longest context", "KV cache", "times fp16"):
        table.add_column(title, justify="right")
    table.add_column("limit")
    fp16 = found.rows[0].tokens
    for row in found.rows:
        table.add_row(
            row.profile,
            row.kv,
            f"{row.tokens:,}",
            f"{row.kv_bytes / 1e9:.2f} GB",
            f"{row.tokens / fp16:.1f}" if fp16 else "-",
            row.limited_by,
        )
    console = Console()
    console.print(
        f"{entry.name}: {found.memory / 1e9:.1f} GB less {entry.weights / 1e9:.2f} GB of weights "
        f"less {found.reserve / 1e9:.1f} GB leaves {found.kv_budget / 1e9:.2f} GB for the KV cache",
        highlight=False,
    )
    console.print(table)
