"""What the engine can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from leankv_mlx.engine.events import Event

Emit = Callable[[Event], None]
"""Called in the engine's thread; must not block."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. A reply's text must be what the events said, unchanged, or
    its tokens are read again."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model: a folder, a GGUF file, a hub id, or "" for the bundled one.

    Attributes:
        kv: a `--kv` text, or "none".
        budget: bytes that the KV cache may take; 0 for what the machine has to spare.
    """

    model: str = ""
    kv: str = "leankv"
    budget: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """Continue a conversation with the model's reply. `temperature` 0 is greedy.

    Attributes:
        model: what was loaded, or asked for, when this was asked: another model does not answer.
            None takes any.
        summary: the turns end with the instruction to summarize them (`compaction.asked`). What
            does not fit is then summarized by parts.
    """

    request: int
    turns: tuple[Turn, ...]
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    model: str | None = None
    summary: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """Fill the cache with a conversation whose last message is not complete yet, for example a
    document that a question will follow. Ends like a reply of no tokens.

    Attributes:
        name: what to call it in the document cache, from which it is opened if it was read before;
            "" for what should not be written to a disk.
    """

    request: int
    turns: tuple[Turn, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Recode:
    """Change the compression of the session."""

    kv: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Empty the cache: another conversation begins."""


Request = Load | Reply | Read | Recode | Forget


class Cancelled(Exception):
    """A request was stopped, or the engine closes."""


class Control(Protocol):
    """What whoever serves a request tells, and whether it should go on."""

    def emit(self, event: Event) -> None:
        """Tell an event."""

    def check(self, request: int) -> None:
        """Raise `Cancelled` if a reply (0: the load being served) should end."""


class EngineLike(Protocol):
    """What a user interface needs; the real engine and the replaying one have it."""

    def start(self) -> None:
        """Begin to serve requests."""

    def submit(self, request: Request) -> None:
        """Serve a request after those before it."""

    def stop(self, request: int) -> None:
        """Stop a reply, running or waiting; 0 stops the downloads and conversions of all loads
        that were asked for so far."""

    def close(self, timeout: float = 10.0) -> None:
        """Stop everything and wait for the thread."""
