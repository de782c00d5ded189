"""The Typer app and how errors leave it. One command per file; imports neither mlx nor textual."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from leankv_mlx.cli import bench, calibrate, demo, doctor, eval, generate, models, plan
from leankv_mlx.errors import LeanKVError

app = typer.Typer(
    name="leankv",
    help="A compressed KV cache for MLX language models, behind mlx-lm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench.register(app)
calibrate.register(app)
demo.register(app)
doctor.register(app)
eval.register(app)
generate.register(app)
models.register(app)
plan.register(app)


def _version(show: bool) -> None:
    if show:
        from leankv_mlx import __version__

        typer.echo(f"leankv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere in the line.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1 failure, 2 bad usage, 130 Ctrl+C."""
    # --debug is ours wherever it stands, because `generate` hands its arguments to mlx-lm.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, prog_name="leankv", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader has gone; without this, Python reports the failed flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as leave:  # argparse, inside mlx-lm's command, after --help
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = _described(error)
        print(f"leankv: error: {text}", file=sys.stderr)
        return code
    return code if isinstance(code, int) else 0


def _described(error: Exception) -> tuple[str, int]:
    """One line, and the exit code."""
    if isinstance(error, LeanKVError):
        text, code = str(error), error.exit_code
    elif hasattr(error, "format_message"):  # bad usage of our own commands, found by Typer
        text, code = f"{error.format_message().rstrip('.')}; see leankv --help.", 2
    else:
        text, code = f"{type(error).__name__}: {error} (--debug shows where).", 1
    return " ".join(text.split()), code


def main() -> None:
    """Entry point of the `leankv` script."""
    sys.exit(run(sys.argv[1:]))
