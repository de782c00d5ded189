"""Where the app keeps its files: LEANKV_HOME, else the XDG variables, else the system's places."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

NAME = "leankv"


@dataclass(frozen=True, slots=True)
class Paths:
    """Files of the app; folders are made when something is written."""

    database: Path
    settings: Path
    exports: Path

    def lines(self) -> list[str]:
        """What --paths prints."""
        return [
            f"chats     {self.database}",
            f"settings  {self.settings}",
            f"exports   {self.exports}",
        ]


def paths() -> Paths:
    """The paths of this user."""
    if home := os.environ.get("LEANKV_HOME"):
        root = Path(home).expanduser()
        data = config = root
    else:
        import platformdirs

        data = _xdg("XDG_DATA_HOME") or Path(platformdirs.user_data_dir(NAME, appauthor=False))
        config = _xdg("XDG_CONFIG_HOME") or Path(
            platformdirs.user_config_dir(NAME, appauthor=False)
        )
    return Paths(data / "chats.db", config / "settings.json", data / "exports")


def _xdg(variable: str) -> Path | None:
    """Honoured on every system, not only where platformdirs looks at it."""
    value = os.environ.get(variable)
    return Path(value).expanduser() / NAME if value else None
