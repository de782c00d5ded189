"""Where files of the user lie: LEANKV_HOME, else the XDG variables, else the system's places; and
how long their names may be.

Nothing here makes a folder; whoever writes there does.
"""

import os
from pathlib import Path
from typing import Literal

NAME = "leankv"
Kind = Literal["data", "config", "cache"]
_LONGEST_NAME = 255
"""Bytes that the usual file systems allow in the name of a file."""


def folder(kind: Kind) -> Path:
    """The folder for one kind of file. In LEANKV_HOME, caches have a folder of their own, so that
    it can be deleted without a loss."""
    if home := os.environ.get("LEANKV_HOME"):
        root = Path(home).expanduser()
        return root / "cache" if kind == "cache" else root
    # XDG is honoured on every system, not only where platformdirs looks at it.
    if base := os.environ.get(f"XDG_{kind.upper()}_HOME"):
        return Path(base).expanduser() / NAME
    import platformdirs

    find = {
        "data": platformdirs.user_data_dir,
        "config": platformdirs.user_config_dir,
        "cache": platformdirs.user_cache_dir,
    }[kind]
    return Path(find(NAME, appauthor=False))


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~user` as the home; where there is no such user it is the name of a
    file, as for a shell, and comes back absolute, so that nobody looks for a home again."""
    path = Path(path)
    try:
        return path.expanduser()
    except (RuntimeError, ValueError):
        return path.absolute()


def file_name(stem: str, suffix: str = "") -> str:
    """`stem` and `suffix` as the name of a file; of a name that is too long the stem loses whole
    characters at its end. File systems count bytes: a CJK character has three."""
    room = max(0, _LONGEST_NAME - _bytes(suffix))
    stem = stem[:room]
    while _bytes(stem) > room:
        stem = stem[:-1]
    return stem + suffix


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))  # names that are not UTF-8 have surrogates
