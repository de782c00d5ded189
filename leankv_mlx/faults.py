"""The last border: any error as one line, with the traceback of an unexpected one in a file."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

from leankv_mlx.errors import LeanKVError
from leankv_mlx.folders import folder
from leankv_mlx.terminal import line

_MOST_BYTES = 1 << 20
"""Size at which the log is begun anew; the one before it is kept beside it."""
_LONGEST_TRACEBACK, _LONGEST_LINE = 1 << 16, 500  # characters


def log_file() -> Path:
    """Where tracebacks go."""
    return folder("data") / "errors.log"


def described(error: BaseException) -> str:
    """One line about an error; never raises.

    Errors that were raised on purpose say what to do. The traceback of any other is appended to
    `log_file`, and the line names it.
    """
    if isinstance(error, LeanKVError):
        return line(str(error))
    said = line("".join(traceback.format_exception_only(error)))
    if len(said) > _LONGEST_LINE:
        said = f"{said[:_LONGEST_LINE]} …"
    kept = keep("".join(traceback.format_exception(error)))
    return f"{said} (the traceback is in {kept})" if kept else said


def keep(text: str) -> Path | None:
    """Append to the log; None where it cannot be written."""
    from leankv_mlx import __version__

    path = log_file()
    head = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} leankv-mlx {__version__}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
        # The end says most, so that is what is left of a long one.
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{head}{text[-_LONGEST_TRACEBACK:]}\n")
    except OSError:
        return None
    return path
