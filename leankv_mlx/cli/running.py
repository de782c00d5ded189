"""How a command ends: its exit code, and its errors as one line on stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from leankv_mlx.blas import bind
from leankv_mlx.errors import LeanKVError
from leankv_mlx.faults import described
from leankv_mlx.terminal import line

HANDED_ON: dict[str, Any] = {
    "context_settings": {
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    "add_help_option": False,
}
"""How Typer registers a command whose line another parser reads, --help included."""


def run_command(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1 failure, 2 bad usage, 130 Ctrl+C.

    Args:
        name: what the user typed, for messages.
    """
    # --debug is ours wherever it stands, because `generate` hands its arguments to mlx-lm.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    bind()  # before anything imports mlx
    try:
        code = app(arguments, prog_name=name, standalone_mode=False)
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
        text, code = _described(error, name)
        if text:  # not where help was asked for or is all there is to say
            print(f"{name}: error: {text}", file=sys.stderr)
        return code
    return code if isinstance(code, int) else 0


def _described(error: Exception, name: str) -> tuple[str, int]:
    """One line, and the exit code."""
    if isinstance(error, LeanKVError):
        text, code = described(error), error.exit_code
    elif hasattr(error, "format_message"):  # bad usage of our own commands, found by Typer
        text, code = error.format_message().rstrip("."), 2
        if text:
            context = getattr(error, "ctx", None)
            text += f"; see {context.command_path if context else name} --help."
    else:
        text, code = described(error), 1
    return line(text), code
