"""The cells of a workbook (xlsx) as Markdown tables, through openpyxl, of the extra docs.

Rows and columns without a value are left out: two cells in opposite corners of a sheet are a file
of 1.4 KB, and 17 billion cells between them.
"""

from __future__ import annotations

import datetime
import io
from itertools import islice
from typing import Any

import openpyxl

_MAX_ROWS = 1 << 20
"""Of a sheet; what gives a row a higher number is damaged."""


def workbook_text(raw: bytes) -> str:
    """A table for each sheet that has cells, under the sheet's name; the first row is its head.

    Raises:
        Exception: whatever openpyxl raises on a file that is damaged.
    """
    book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    return "\n\n".join(f"## {sheet.title}\n{_table(sheet)}" for sheet in book.worksheets)


def _table(sheet: Any) -> str:
    sheet.reset_dimensions()  # what the file says about its size need not be true
    rows: list[dict[int, str]] = []
    for row in islice(sheet.iter_rows(values_only=True), _MAX_ROWS):
        if cells := {i: _cell(value) for i, value in enumerate(row) if value is not None}:
            rows.append(cells)
    columns = sorted(set().union(*rows))
    if not columns:
        return ""
    head, *body = (_line([row.get(column, "") for column in columns]) for row in rows)
    return "\n".join([head, _line(["---"] * len(columns)), *body])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return " ".join(str(value).split()).replace("|", r"\|")
