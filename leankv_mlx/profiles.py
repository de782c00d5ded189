"""Named settings: those of models.toml, and the user's own, which `leankv calibrate` writes."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from leankv_mlx.atomic import write_text
from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.folders import folder
from leankv_mlx.resources import models_toml

_NAME = re.compile(r"[A-Za-z][\w-]*")


def user_profiles() -> Path:
    """The user's own file; it need not exist."""
    return folder("config") / "profiles.toml"


def profiles() -> dict[str, str]:
    """Profile name -> settings as in `--kv leankv:SETTINGS`; the user's own win.

    Raises:
        ConfigError: the user's file is not what `leankv calibrate` writes.
    """
    found = {name: row["kv"] for name, row in _read(models_toml()).items()}
    own = user_profiles()
    if own.exists():
        found |= {name: row["kv"] for name, row in _read(own).items()}
    return found


def check_name(name: str) -> None:
    """Whether a new profile may be called so.

    Raises:
        UsageError: it may not.
    """
    if not _NAME.fullmatch(name) or re.fullmatch(r"k\d+v\d+", name):
        raise UsageError(
            f"a profile cannot be called {name!r}; use letters, digits, - and _, as in my-model."
        )


def save_profile(path: Path, name: str, kv: str, about: str) -> None:
    """Add a profile to a file, or replace it there; other profiles stay.

    Raises:
        ConfigError: the file holds something else.
        UsageError: it cannot be written.
    """
    rows = _read(path) if path.exists() else {}
    rows[name] = {"kv": kv, "about": about}
    # A string of JSON is a string of TOML, once DEL is escaped.
    text = "\n".join(
        f"[profiles.{name}]\nkv = {json.dumps(row['kv'])}\nabout = {json.dumps(row['about'])}\n"
        for name, row in rows.items()
    ).replace("\x7f", "\\u007f")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = document.get("profiles", {})
        return {
            name: {"kv": _text(row["kv"]), "about": _text(row.get("about", ""))}
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a file of profiles ({error}); mend or move it."
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
