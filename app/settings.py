"""Choices that outlive a session, in a small JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """Attributes:
    model: folder, .gguf file or hub id, "" for the demo model.
    kv: a `--kv` text or a profile's name.
    panel: whether the memory panel is shown.
    """

    theme: str = "textual-dark"
    model: str = ""
    kv: str = "leankv"
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    panel: bool = True


RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 5.0),
    "top_p": (0.01, 1.0),
    "max_tokens": (1, 1_000_000),
}


def load(path: Path) -> tuple[Settings, str]:
    """The settings, and what was wrong with the file ("" if nothing).

    A file that is not understood is set aside as `NAME.broken`, never overwritten.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings(), ""
    except (OSError, UnicodeDecodeError) as error:
        return Settings(), f"The settings file {path} cannot be read ({_why(error)})."
    try:
        return from_dict(json.loads(text)), ""
    except (ValueError, TypeError) as error:
        aside = path.with_name(path.name + ".broken")
        try:
            path.replace(aside)
        except OSError:
            aside = path
        return Settings(), (
            f"The settings file is damaged ({error}); it is now {aside}, "
            "and the default settings are in use."
        )


def from_dict(found: Any) -> Settings:
    """Settings from a parsed file; unknown names are ignored.

    Raises:
        ValueError: a value is of the wrong kind or out of range.
    """
    if not isinstance(found, dict):
        raise ValueError("it is not a table of settings")
    values = {
        field.name: checked(field.name, found[field.name])
        for field in fields(Settings)
        if field.name in found
    }
    return Settings(**values)


def checked(name: str, value: Any) -> Any:
    """A value as the setting's type; text is converted.

    Raises:
        ValueError: it does not fit.
    """
    kind = type(getattr(Settings(), name, None))
    if kind is type(None):
        known = ", ".join(field.name for field in fields(Settings))
        raise ValueError(f"no setting {name}; known are {known}")
    if kind is bool and isinstance(value, str):
        if value not in ("on", "off"):
            raise ValueError(f"{name} is on or off")
        return value == "on"
    try:
        value = kind(value) if isinstance(value, str) or kind is float else value
    except ValueError:
        raise ValueError(f"{name} is not a number: {value}") from None
    if type(value) is not kind:
        raise ValueError(f"{name} has the wrong type")
    low, high = RANGES.get(name, (None, None))
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name} is from {low} to {high}")
    return value


def save(path: Path, settings: Settings) -> str:
    """Write the file in one step; returns what went wrong, "" if nothing."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        return f"The settings could not be saved in {path} ({_why(error)})."
    return ""


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
