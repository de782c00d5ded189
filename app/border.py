"""What the screen shows never drives the terminal: Textual leaves ESC and C1 in its lines."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from leankv_mlx.terminal import printable


class Border(LineFilter):
    """The border to the terminal (`leankv_mlx.terminal`) for every line of every widget."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The same line without what controls a terminal; it is as wide as before, because that
        had no width."""
        return [
            segment if (text := printable(segment.text)) == segment.text
            else Segment(text, segment.style, segment.control)
            for segment in segments
        ]  # fmt: skip
