"""Partial summaries on disk, so that an interrupted run is continued, not repeated."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from leankv_mlx import __version__
from leankv_mlx.atomic import locked, read_text, remove_dead, write_text
from leankv_mlx.folders import folder

_KEPT_SECONDS = 30 * 86400.0
_OURS = re.compile(r"[0-9a-f]{32}\.json")
_UNFINISHED = re.compile(rf"\.{_OURS.pattern}\.[0-9a-f]{{8}}\.tmp")  # see atomic.py


class Partials:
    """The partial summaries of one document, model and setting.

    Args:
        job: everything that they depend on, besides the prompts.
        place: the folder; by default the user's.
    """

    def __init__(self, job: Sequence[str], place: Path | None = None) -> None:
        self.place = folder("cache") / "summaries" if place is None else place
        self.path = self.place / f"{_digest(json.dumps([__version__, *job]))}.json"
        self._texts = _read(self.path)
        self.reused = 0

    def find(self, prompt: Sequence[int], max_tokens: int) -> str | None:
        """What a prompt was answered with before."""
        found = self._texts.get(_name(prompt, max_tokens))
        self.reused += found is not None
        return found

    def keep(self, prompt: Sequence[int], max_tokens: int, text: str) -> None:
        """Write an answer down; on a disk that is full the run goes on without."""
        self._texts[_name(prompt, max_tokens)] = text
        with suppress(OSError):
            self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(self.place):  # another process may summarize the same document
                self._texts = _read(self.path) | self._texts
                content = json.dumps(self._texts)
                write_text(self.path, json.dumps({"digest": _digest(content), "texts": content}))

    @property
    def kept(self) -> int:
        """How many there are on disk."""
        return len(_read(self.path))

    def done(self) -> None:
        """Remove them, those that nobody came back for in a month, and what dead writers left."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            remove_dead(path for path in self.place.iterdir() if _UNFINISHED.fullmatch(path.name))
            for path in self.place.iterdir():
                if _OURS.fullmatch(path.name) and _age(path) > _KEPT_SECONDS:
                    path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, str]:
    """The texts of a file; none if it is missing or not exactly what was written."""
    try:
        whole = json.loads(read_text(path))
        content = whole["texts"]
        if whole["digest"] != _digest(content):
            return {}
        texts: dict[str, str] = json.loads(content)
        return texts if all(isinstance(text, str) for text in texts.values()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _name(prompt: Sequence[int], max_tokens: int) -> str:
    return _digest(json.dumps([max_tokens, *prompt]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
