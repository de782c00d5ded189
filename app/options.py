"""What the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """None or "" leaves a choice to the settings.

    Attributes:
        model: folder, .gguf file or hub id.
        kv: a `--kv` text or a profile's name.
        system: system prompt.
        files: documents to read at the start; paths or addresses.
        budget: bytes that the KV cache may take, 0 for what the machine has to spare.
        resume: number of a session, or "last".
        record: file that gets the engine's events.
        replay: recording that stands in for the engine.
        replay_speed: how many times faster than recorded; 0 waits nowhere.
    """

    model: str | None = None
    kv: str | None = None
    system: str | None = None
    files: tuple[str, ...] = ()
    budget: int = 0
    resume: str = ""
    record: Path | None = None
    replay: Path | None = None
    replay_speed: float = 1.0
