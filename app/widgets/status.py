"""The line at the bottom: model, compression, and on narrow terminals the memory in short."""

from __future__ import annotations

from textual.widgets import Static

from leankv_app.format import megabytes
from leankv_app.texts import saving
from leankv_mlx.engine.events import Loaded, Snapshot


class StatusLine(Static):
    """Everything that matters in one line."""

    def __init__(self) -> None:
        super().__init__("starting", id="status", markup=False)
        self._model = ""
        self._memory = ""

    def loaded(self, event: Loaded, kv: str) -> None:
        """Another model is ready."""
        self.model(event.name, kv, event.backend)

    def model(self, name: str, kv: str, backend: str) -> None:
        """What runs."""
        self._model = f"{name} · {kv}" + (f" · {backend}" if backend != "none" else "")
        self._show()

    def no_model(self) -> None:
        """None could be loaded."""
        self._model = "no model; Ctrl+O lists some"
        self._show()

    def memory(self, snapshot: Snapshot) -> None:
        """The cache now."""
        speed = f" · {snapshot.speed:.0f} tok/s" if snapshot.speed else ""
        text, saves = saving(snapshot)
        worth = text.partition(";")[0]  # the panel has room for the rest
        of = f" (fp16 {megabytes(snapshot.fp16)})" if saves else ""
        self._memory = (
            f"{worth} · {megabytes(snapshot.used)}{of}{speed} · {snapshot.context_left:,} left"
        )
        self._show()

    def _show(self) -> None:
        narrow = self.app.size.width < 100
        first = [self._memory, self._model] if narrow else [self._model, self._memory]
        self.update(" │ ".join(filter(None, first)))
