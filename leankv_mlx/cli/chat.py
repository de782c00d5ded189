"""`leankv chat`: the chat app, which stands above this package and is found by its script."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer

from leankv_mlx.cli.running import HANDED_ON
from leankv_mlx.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("chat", **HANDED_ON)(chat)


def chat(context: typer.Context) -> int | None:
    """Chat in the terminal: the same as leankv-chat (see leankv chat --help)."""
    found = entry_points(group="console_scripts", name="leankv-chat")
    if not found:
        raise UsageError("leankv-chat is not installed; run pip install leankv-mlx.")
    main = next(iter(found)).load()
    program: typer.Typer = sys.modules[main.__module__].app
    code: int | None = program(context.args, prog_name="leankv chat", standalone_mode=False)
    return code
