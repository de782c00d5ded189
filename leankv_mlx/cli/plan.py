"""`leankv plan`: how long a context fits a machine's memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from leankv_mlx.cli.console import list_console, list_table
from leankv_mlx.errors import UsageError
from leankv_mlx.terminal import say_json

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
        say_json(asdict(found))
    else:
        _show(found)


def _show(found: Plan) -> None:
    entry = found.model
    out = list_console()
    table = list_table(out)
    table.add_column("profile", no_wrap=True)
    table.add_column("kv", overflow="fold")
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
    out.print(
        f"{entry.name}: {found.memory / 1e9:.1f} GB less {entry.weights / 1e9:.2f} GB of weights "
        f"less {found.reserve / 1e9:.1f} GB leaves {found.kv_budget / 1e9:.2f} GB for the KV cache",
        highlight=False,
    )
    out.print(table)
