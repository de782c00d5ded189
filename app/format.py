"""Numbers, names and sentences as people read them."""

from __future__ import annotations

import re
from pathlib import PurePath

_OPENING = re.compile(r"(there (is|are)|no|the|an?|cannot) ")
"""How our errors begin where they do not begin with a name."""


def megabytes(n: float) -> str:
    """Bytes in kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def model_name(model: str) -> str:
    """How to call what a model was asked for by: a hub id as it is, a path by its last part."""
    hub_id = model.count("/") == 1 and model[0] not in "/~."
    return model if hub_id else PurePath(model).name


def counted(n: int, thing: str) -> str:
    """A number of things: 1 token, 2,000 tokens."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def sentence(text: str) -> str:
    """An error as a sentence. The name of a file or model at its beginning stays as it is."""
    return text[:1].upper() + text[1:] if _OPENING.match(text) else text


def shortened(text: str, length: int) -> str:
    """A text on one line of at most `length` characters, cut behind a word."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    words = text[:length].rpartition(" ")[0]
    if len(words) < length // 2:  # one very long word, or a script that writes no spaces
        words = text[: length - 1]
    return f"{words.rstrip(' ,;:.-')}…"


def sayable(text: str) -> str:
    """A text that can be stored and shown: names of files that are no UTF-8 have characters that
    stand for a byte."""
    return text.encode("utf-8", "replace").decode("utf-8")
