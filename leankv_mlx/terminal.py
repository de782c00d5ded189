"""The border to a terminal: text from outside never drives it.

Replies, documents, file names and answers of servers may hold escape sequences, which can write
the clipboard, switch the screen or move the cursor. What goes to a terminal passes `printable`.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

# All of C0 but tab and newline, DEL, C1 (0x9b begins a sequence as ESC [ does), and lone
# surrogates, which stand for the bytes of a file name that are not UTF-8 and cannot be printed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """A text without what controls a terminal; tabs and line ends stay, `\\r\\n` becomes `\\n`."""
    return _CONTROL.sub(_shown, text)


def _shown(control: re.Match[str]) -> str:
    return "\N{REPLACEMENT CHARACTER}" if control[0] >= "\ud800" else ""


def line(text: str) -> str:
    """A printable text as one line."""
    return " ".join(printable(text).split())


def say(text: str, end: str = "\n") -> None:
    """Print a text that may hold anything to stdout."""
    print(printable(text), end=end, flush=not end)  # without an end it is a piece of a line


def json_text(value: Any, indent: int | None = 2) -> str:
    """A JSON document in which all that `printable` takes out is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _CONTROL.sub(lambda control: f"\\u{ord(control[0]):04x}", text)


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON document to stdout."""
    print(json_text(value, indent))


def note(text: str) -> None:
    """A line on stderr that is no error."""
    print(f"leankv: note: {line(text)}", file=sys.stderr)
