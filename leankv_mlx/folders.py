"""Where files of the user lie: LEANKV_HOME, else the XDG variables, else the system's places.

Nothing here makes a folder; whoever writes there does.
"""

import os
from pathlib import Path
from typing import Literal

NAME = "leankv"
Kind = Literal["data", "config", "cache"]


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
