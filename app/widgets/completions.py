"""The list of commands above the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

ROWS = 6


class CompletionList(Static):
    """Up to six choices around the chosen one."""

    def __init__(self) -> None:
        super().__init__(id="completions")
        self.display = False

    def offer(self, choices: Sequence[str], chosen: int, about: dict[str, str]) -> None:
        """Show choices with what they do; none hides the list."""
        self.display = bool(choices)
        first = max(0, min(chosen - ROWS // 2, len(choices) - ROWS))
        lines = []
        for index, choice in enumerate(choices[first : first + ROWS], first):
            style = "reverse" if index == chosen else ""
            text = about.get(choice.strip(), "")
            lines.append(Content.styled(f" {choice.strip():<14} {text} ", style))
        self.update(Content("\n").join(lines))
