"""The hub client's progress bars as `Downloading` events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from leankv_mlx.engine.events import Downloading
from leankv_mlx.engine.requests import Emit

_SECONDS = 0.1


def progress_class(model: str, emit: Emit, check: Callable[[], None]) -> type:
    """A class in the manner of tqdm that draws nothing and tells bytes.

    Args:
        check: called at every step; what it raises ends the download.
    """
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()
    last = [0.0]

    class Progress(tqdm):  # type: ignore[misc]
        """The client makes one for files and two for bytes: sent, and written to disk."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            options["disable"] = False
            super().__init__(*args, **options)

        def display(self, *args: Any, **options: Any) -> bool:
            """Draw nothing."""
            return True

        def update(self, n: float | None = 1) -> bool | None:
            """Count, and tell."""
            check()
            with lock:
                self.n += n or 0
                now = time.monotonic()
                complete = bool(self.total) and self.n >= self.total
                if self.unit == "B" and (now - last[0] > _SECONDS or complete):
                    last[0] = now
                    emit(Downloading(model, int(self.n), int(self.total or 0)))
            return True

    return Progress
