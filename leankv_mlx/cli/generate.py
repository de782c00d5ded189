"""`leankv generate`: mlx-lm's generate command with `--kv`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "generate",
        # mlx-lm's own parser reads everything, --help included.
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": [],
        },
        add_help_option=False,
    )(generate)


def generate(context: typer.Context) -> None:
    """Generate text: mlx-lm's own flags, and --kv (see leankv generate --help)."""
    from leankv_mlx.mlx_lm.command import run_generate

    run_generate(context.args)
