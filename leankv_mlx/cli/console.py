"""Tables of figures on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leankv_mlx.evaluation.tables import Grid


def show(grids: Sequence[Grid], machine: str, to_stderr: bool) -> None:
    """Print tables, and the machine that the figures are of."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file has no width; wrapped numbers are no use
    for grid in grids:
        table = Table(title=grid.title, title_justify="left")
        for i, name in enumerate(grid.header):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in grid.rows:
            table.add_row(*map(Text, row))
        if grid.rows:
            console.print(table)
        if grid.note:
            console.print(grid.note, markup=False, highlight=False)
        console.print()
    console.print(machine, style="dim", markup=False, highlight=False)
