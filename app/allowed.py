"""What `/set` takes: the settings, their values, and what each may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from textual.theme import BUILTIN_THEMES

from leankv_app.factory import full_kv, kv_choices
from leankv_app.settings import RANGES, Settings, checked
from leankv_mlx.errors import ConfigError

_AT_START = {"model": "/model", "kv": "/kv", "system": "/system"}
"""What holds from the next start on, and the command that changes this chat."""
_CLEARED = ('""', "''")


def choices(name: str) -> Sequence[str]:
    """The values of a setting where there are few."""
    if name == "theme":
        return sorted(BUILTIN_THEMES)
    if name == "panel":
        return ("on", "off")
    return kv_choices() if name == "kv" else ()


def allowed(name: str) -> str:
    """What a setting may be, in words."""
    if name in RANGES:
        return " to ".join(f"{end:g}" if isinstance(end, float) else f"{end:,}"
                           for end in RANGES[name])  # fmt: skip
    if name == "kv":
        return f"{', '.join(kv_choices())}, or bits such as k4v4"
    return ", ".join(choices(name)) or f"any text, or {_CLEARED[0]} for none"


def listing(settings: Settings, name: str = "") -> str:
    """A line for each setting, or for one: its value and what it may be.

    Raises:
        ValueError: there is no such setting.
    """
    names = (_known(name),) if name else Settings.__slots__
    return "\n".join(
        f"{each} is {shown(getattr(settings, each))} ({allowed(each)})" for each in names
    )


def changed(settings: Settings, name: str, text: str) -> Settings:
    """Settings with another value, from how it is typed.

    Raises:
        ValueError: there is no such setting, or it may not be that.
    """
    value = checked(_known(name), "" if text in _CLEARED else text)
    if name == "theme" and value not in BUILTIN_THEMES:
        raise ValueError(f"there is no theme {value}; there are {allowed(name)}")
    if name == "kv":
        try:
            full_kv(value)
        except ConfigError as error:
            raise ValueError(str(error).rstrip(".")) from error
    return replace(settings, **{name: value})


def confirmation(settings: Settings, name: str) -> str:
    """What to say after a setting was changed."""
    line = f"{name} is now {shown(getattr(settings, name))}"
    if command := _AT_START.get(name):
        return f"{line}, from the next start on; {command} changes this chat."
    return f"{line}."


def _known(name: str) -> str:
    if name not in Settings.__slots__:
        raise ValueError(f"there is no setting {name}; there are {', '.join(Settings.__slots__)}")
    return name


def shown(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or "(none)"
