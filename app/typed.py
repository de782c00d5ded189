"""What a line of the prompt is: a message, a command, or the path of a file."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from leankv_mlx.documents.urls import SCHEMES
from leankv_mlx.folders import expanded

_COMMAND = re.compile(r"(/[^\s/*]*)(?:\s+(.*))?", re.DOTALL)
_LONGEST_PATH = 4096


def command_of(line: str) -> tuple[str, str] | None:
    """The name of a command with its slash and what follows it, None for a message.

    A first word with a second slash, as in paths, and the beginning of a comment are no names of
    commands. A line that is nothing but the path of a file, as terminals write it when one is
    dropped on them, means `/file`.
    """
    line = line.strip()
    if found := _COMMAND.fullmatch(line):
        return found[1], (found[2] or "").strip()
    return ("/file", line) if _is_dropped(line) else None


def path_of(text: str) -> str:
    """A path or address as it was meant: without the quotes and backslashes of a shell, and a
    file: address as the path in it. What exists just as it is written stays so. `~` stays too."""
    text = text.strip()
    if text.lower().startswith(SCHEMES) or _is_file(text):
        return text
    try:
        parts = shlex.split(text)
    except ValueError:  # an open quote, as in a name
        parts = []
    if len(parts) == 1:
        text = parts[0]
    if text.lower().startswith("file:"):
        address = urlsplit(text)
        if address.netloc in ("", "localhost"):
            return os.fsdecode(unquote_to_bytes(address.path))
    return text


def source_of(text: str) -> str:
    """What `read_document` takes, from what was typed behind `/file`."""
    path = path_of(text)
    return path if path.lower().startswith(SCHEMES) else str(expanded(path))


def _is_dropped(line: str) -> bool:
    start = line.lstrip("'\"")
    if not start.startswith(("/", "~/", "file:///")) or len(line) > _LONGEST_PATH:
        return False
    return "\n" not in line and _is_file(path_of(line))


def _is_file(path: str) -> bool:
    try:
        return Path(expanded(path)).is_file()
    except (OSError, ValueError):  # no name of a file at all
        return False
