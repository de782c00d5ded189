"""The `leankv-chat` command. Imports neither mlx nor textual before it is known to be needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from leankv_app.options import Options
from leankv_mlx.cli.reading import Budget, Debug, Model, Version, budget_bytes
from leankv_mlx.cli.running import run_command
from leankv_mlx.errors import UsageError
from leankv_mlx.terminal import printable, say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def chat(
    model: Model = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Compression: leankv, leankv:SPEC, a profile such as small, or none."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="Document or address to read at the start; may repeat."),
    ] = None,
    memory_budget: Budget = "",
    resume: Annotated[
        str, typer.Option(help="Continue a session: its number, or last.", show_default=False)
    ] = "",
    record: Annotated[
        Path | None, typer.Option(help="Write the engine's events to a JSONL file.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Play a recording instead of running a model.")
    ] = None,
    replay_speed: Annotated[
        float, typer.Option(help="Times faster than recorded; 0 waits nowhere.")
    ] = 1.0,
    paths: Annotated[bool, typer.Option("--paths", help="Say where files are kept.")] = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Chat with a model in the terminal and watch the memory that its cache saves."""
    from leankv_app import paths as places

    if paths:
        say("\n".join(places.paths().lines()))
        return
    options = Options(
        model,
        kv,
        system,
        tuple(file or ()),
        budget_bytes(memory_budget),
        resume,
        record,
        replay,
        replay_speed,
    )
    _open(options)


def _open(options: Options) -> None:
    """The screen, until the user leaves it."""
    from leankv_app.factory import check, make_app
    from leankv_app.paths import paths

    check(options)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("leankv-chat needs a terminal; leankv generate works in a pipe.")
    made = make_app(options, paths())
    made.run()
    for line in made.last_words:
        print(printable(line), file=sys.stderr)
    if made.return_code:
        raise typer.Exit(made.return_code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_command(app, "leankv-chat", arguments)


def main() -> None:
    """Entry point of the `leankv-chat` script."""
    sys.exit(run(sys.argv[1:]))
