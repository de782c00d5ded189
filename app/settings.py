"""Choices that outlive a session, in a small JSON file."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from leankv_mlx.atomic import is_lasting, put_aside, read_text, write_text


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

    A file that is not understood is put aside, never overwritten.
    """
    try:
        return from_dict(json.loads(read_text(path))), ""
    except FileNotFoundError:
        return Settings(), ""
    except (OSError, ValueError, TypeError, RecursionError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "is damaged"
        said = f"The settings file {what} ({_why(error)})"
        lasting = is_lasting(error)
    where = str(path)
    if lasting:
        with suppress(OSError):
            where = f"it is now {put_aside(path)}"
    return Settings(), f"{said}; {where}. The default settings are in use."


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
    kind: type[Any] = type(getattr(Settings(), name, None))
    if kind is type(None):
        known = ", ".join(field.name for field in fields(Settings))
        raise ValueError(f"no setting {name}; known are {known}")
    if kind is bool and isinstance(value, str):
        if value not in ("on", "off"):
            raise ValueError(f"{name} is on or off")
        return value == "on"
    try:
        value = kind(value) if isinstance(value, str) or kind is float else value
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} is not a number: {str(value)[:20]}") from None
    if isinstance(value, str):
        value.encode()  # a lone half of a pair is no text: UnicodeEncodeError is a ValueError
    if type(value) is not kind:
        raise ValueError(f"{name} has the wrong type")
    if name in RANGES:
        low, high = RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"{name} is from {low} to {high}")
    return value


def save(path: Path, settings: Settings) -> str:
    """Write the file in one step; returns what went wrong, "" if nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(settings), indent=2) + "\n")
    except OSError as error:
        return f"The settings could not be saved in {path} ({_why(error)})."
    return ""


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
