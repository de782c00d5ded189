"""`leankv serve`: mlx-lm's server with `--kv`."""

from __future__ import annotations

import typer

from leankv_mlx.cli.running import HANDED_ON

_PROG = "leankv serve"
_KV = "leankv"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("serve", **HANDED_ON)(serve)


def serve(context: typer.Context) -> None:
    """Answer OpenAI's API over HTTP: mlx-lm's own flags and --kv (see leankv serve --help)."""
    from leankv_mlx.mlx_lm.flags import serve_help

    if {"-h", "--help"} & set(context.args):
        typer.echo(serve_help(_PROG, _KV), nl=False)
        return
    from leankv_mlx.mlx_lm.commands import run_serve

    run_serve(context.args, _PROG, _KV)
