"""Named settings: those of models.toml, and the user's own, which `leankv calibrate` writes."""

from __future__ import annotations

import json
import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from leankv_mlx.atomic import is_lasting, locked, put_aside, read_text, write_text
from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.folders import folder
from leankv_mlx.resources import models_toml
from leankv_mlx.settings import NAME_FORM


def user_profiles() -> Path:
    """The user's own file; it need not exist."""
    return folder("config") / "profiles.toml"


def profiles() -> dict[str, str]:
    """Profile name -> settings as in `--kv leankv:SETTINGS`; the user's own win.

    Raises:
        ConfigError: the user's file is not what `leankv calibrate` writes.
    """
    rows = _read(models_toml()) | _read(user_profiles())
    return {name: row["kv"] for name, row in rows.items()}


def put_damaged_aside() -> str:
    """Rename the user's file if it is damaged, so that a program can go on; one line that says so,
    "" if nothing is wrong with it."""
    own = user_profiles()
    try:
        _read(own)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and is_lasting(cause):
            with suppress(OSError):
                return f"{str(error).rpartition('; ')[0]}; it is now {put_aside(own)}."
        return str(error)
    return ""


def check_name(name: str) -> None:
    """Whether a new profile may be called so.

    Raises:
        UsageError: it may not.
    """
    if not NAME_FORM.fullmatch(name) or re.fullmatch(r"k\d+v\d+", name):
        raise UsageError(
            f"a profile cannot be called {name!r}; use letters, digits, - and _, as in my-model."
        )


def save_profile(path: Path, name: str, kv: str, about: str) -> None:
    """Add a profile to a file, or replace it there; other profiles stay.

    Raises:
        ConfigError: the file holds something else.
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):  # another process may be adding one
            rows = _read(path)
            rows[name] = {"kv": kv, "about": about}
            write_text(path, _written(rows))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error


def _written(rows: dict[str, dict[str, str]]) -> str:
    """The text of a file. A string of JSON is a string of TOML, once DEL is escaped and nothing
    else is: an escaped emoji would be two halves."""
    return "\n".join(
        f"[profiles.{name if NAME_FORM.fullmatch(name) else _quoted(name)}]\n"
        f"kv = {_quoted(row['kv'])}\nabout = {_quoted(row['about'])}\n"
        for name, row in rows.items()
    )


def _quoted(text: str) -> str:
    whole = text.encode(errors="replace").decode()  # a path may have bytes that are no text
    return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a file; none if it is not there."""
    try:
        document: dict[str, Any] = tomllib.loads(read_text(path))
        rows = document.get("profiles", {})
        return {
            name: {"kv": _text(row["kv"]), "about": _text(row.get("about", ""))}
            for name, row in rows.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise ConfigError(
            f"{path} is not a file of profiles ({reason}); mend or move it."
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
