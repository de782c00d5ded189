"""Where the app keeps its files; `leankv_mlx.folders` says in which folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leankv_mlx.folders import folder


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
    data, config = folder("data"), folder("config")
    return Paths(data / "chats.db", config / "settings.json", data / "exports")
