"""The `leankv-chat` command. Imports neither mlx nor textual before it is known to be needed."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from leankv_mlx.errors import LeanKVError, UsageError
from leankv_mlx.faults import described

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub id (default: the bundled model).")
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Compression: leankv, leankv:SPEC, a profile such as small, or none."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="Document or address to read at the start; may repeat."),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="What the KV cache may take, such as 2GB.")
    ] = None,
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
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Chat with a model in the terminal and watch the memory that its cache saves."""
    from leankv_app import paths as places
    from leankv_app.options import Options

    if version:
        from leankv_mlx import __version__

        typer.echo(f"leankv-chat {__version__}")
        return
    if paths:
        typer.echo("\n".join(places.paths().lines()))
        return
    from leankv_mlx.blas import bind

    bind()  # before anything imports mlx
    from leankv_app.factory import check, make_app
    from leankv_mlx.sizes import parse_bytes

    options = Options(
        model,
        kv,
        system,
        tuple(file or ()),
        parse_bytes(memory_budget) if memory_budget else 0,
        resume,
        record,
        replay,
        replay_speed,
    )
    check(options)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("leankv-chat needs a terminal; leankv generate works in a pipe.")
    made = make_app(options, places.paths())
    made.run()
    for line in made.last_words:
        typer.echo(line, err=True)
    if made.return_code:
        raise typer.Exit(made.return_code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(list(arguments), prog_name="leankv-chat", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        text, code = _described(error)
        print(f"leankv-chat: error: {' '.join(text.split())}", file=sys.stderr)
        return code
    return code if isinstance(code, int) else 0


def _described(error: Exception) -> tuple[str, int]:
    if isinstance(error, LeanKVError):
        return described(error), error.exit_code
    if hasattr(error, "format_message"):
        return f"{error.format_message().rstrip('.')}; see leankv-chat --help.", 2
    return described(error), 1


def main() -> None:
    """Entry point of the `leankv-chat` script."""
    sys.exit(run(sys.argv[1:]))
