"""The Typer app: one command per file. Imports neither mlx nor textual."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from leankv_mlx.cli import (
    ask,
    bench,
    cache,
    calibrate,
    chat,
    demo,
    doctor,
    eval,
    generate,
    learn,
    models,
    plan,
    serve,
    summarize,
)
from leankv_mlx.cli.reading import Version
from leankv_mlx.cli.running import run_command

app = typer.Typer(
    name="leankv",
    help="A compressed KV cache for MLX language models, behind mlx-lm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ask.register(app)
bench.register(app)
calibrate.register(app)
cache.register(app)
chat.register(app)
demo.register(app)
doctor.register(app)
eval.register(app)
generate.register(app)
learn.register(app)
models.register(app)
plan.register(app)
serve.register(app)
summarize.register(app)


@app.callback()
def _options(
    version: Version = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere in the line.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_command(app, "leankv", arguments)


def main() -> None:
    """Entry point of the `leankv` script."""
    sys.exit(run(sys.argv[1:]))
