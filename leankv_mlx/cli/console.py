"""What the commands draw on the terminal: tables of figures, and bars."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from leankv_mlx.terminal import printable

if TYPE_CHECKING:
    from leankv_mlx.evaluation.tables import Grid


class PlainConsole(Console):
    """A console whose texts cannot drive the terminal: Rich leaves ESC and C1 in them."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of a renderable; those of Rich itself stay as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(stderr: bool = False, **options: Any) -> Console:
    """Rich's console behind the border to the terminal (`leankv_mlx.terminal`)."""
    return PlainConsole(stderr=stderr, **options)


def list_console() -> Console:
    """A console on stdout for lists; a file has no width, and gets whole rows."""
    out = console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = max(out.width, 140)
    return out


def list_table(out: Console) -> Table:
    """A table for lists; on a narrow terminal without the lines that cost width."""
    return Table(box=box.SIMPLE_HEAD if is_narrow(out) else box.HEAVY_HEAD)


def is_narrow(out: Console) -> bool:
    """Whether a list has to do with few columns."""
    return out.width < 120


def show(grids: Sequence[Grid], machine: str, to_stderr: bool) -> None:
    """Print tables, and the machine that the figures are of."""
    out = console(to_stderr)
    if not out.is_terminal:
        out.width = max(out.width, 160)  # a file has no width; wrapped numbers are no use
    for grid in grids:
        table = Table(title=grid.title, title_justify="left")
        for i, name in enumerate(grid.header):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in grid.rows:
            table.add_row(*map(Text, row))
        if grid.rows:
            out.print(table)
        if grid.note:
            out.print(grid.note, markup=False, highlight=False)
        out.print()
    out.print(machine, style="dim", markup=False, highlight=False)
