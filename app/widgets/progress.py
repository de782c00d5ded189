"""One line that says what is being waited for, with a bar where the end is known."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import ProgressBar, Static


class ProgressLine(Horizontal):
    """Hidden while nothing is waited for."""

    def __init__(self) -> None:
        super().__init__(id="progress")

    def compose(self) -> ComposeResult:
        yield Static("", id="progress-text", markup=False)
        yield ProgressBar(id="progress-bar", show_eta=False)

    def on_mount(self) -> None:
        self.display = False

    def wait(self, text: str, done: float = 0, total: float | None = None) -> None:
        """Show a text, and a bar if there is a total."""
        self.display = True
        self.query_one("#progress-text", Static).update(text)
        bar = self.query_one(ProgressBar)
        bar.display = total is not None
        if total is not None:
            bar.update(total=max(total, 1), progress=done)

    def end(self) -> None:
        """Nothing is waited for."""
        self.display = False
