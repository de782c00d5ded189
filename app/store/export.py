"""A session as a Markdown file."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from leankv_app.format import shortened
from leankv_app.store.sessions import Message
from leankv_mlx import folders

_HEADINGS = {"user": "You", "assistant": "Model", "summary": "Summary of what came before"}


def markdown(title: str, model: str, kv: str, messages: Sequence[Message]) -> str:
    """The text of the file."""
    parts = [f"# {title}", f"Model: {model or 'demo model'}, KV cache: {kv}"]
    for message in messages:
        note = "" if message.status == "done" else f" ({message.status})"
        parts += [f"## {_HEADINGS[message.role]}{note}", message.shown or message.text]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def file_name(title: str) -> str:
    """A name for the file, with the date."""
    words = re.sub(r"[^\w]+", "-", shortened(title.casefold(), 40)).strip("-") or "chat"
    return f"{time.strftime('%Y-%m-%d')}-{words}.md"


def write(path: Path, text: str) -> Path:
    """Write to `path`, or beside it under a free name; never over another file.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(folders.file_name(path.stem, f"-{number}{path.suffix}"))
    free.write_text(text, encoding="utf-8")
    return free
