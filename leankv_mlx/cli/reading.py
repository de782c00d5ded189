"""What commands have in common, those about documents above all: options, notes and progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli.console import console
from leankv_mlx.sizes import parse_bytes
from leankv_mlx.terminal import note

if TYPE_CHECKING:
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.documents.cache import DocumentCache
    from leankv_mlx.documents.reader import Reader
    from leankv_mlx.documents.readers import Document

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder, GGUF file or hub id (default: the bundled model)."),
]
Kv = Annotated[
    str, typer.Option(help="KV cache: leankv, leankv:SPEC, or none for the uncompressed one.")
]
Budget = Annotated[
    str, typer.Option(help="What the KV cache may take, such as 2GB.", show_default="what is spare")
]
Encoding = Annotated[
    str, typer.Option(help="Encoding of texts and pages.", show_default="found out")
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Neither open nor keep documents that were read.")
]
LastJson = Annotated[
    bool, typer.Option("--json", help="One JSON document as the last line on stdout.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(context: typer.Context, show: bool) -> None:
    if show:
        from leankv_mlx import __version__

        typer.echo(f"{context.command_path} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
]


def budget_bytes(text: str) -> int:
    """The value of --memory-budget; 0 stands for what is spare."""
    return parse_bytes(text) if text else 0


def document(source: str, encoding: str = "") -> Document:
    """Read a document and say what was noticed."""
    from leankv_mlx.documents.readers import read_document

    found = read_document(source, encoding)
    for line in found.notes:
        note(line)
    return found


def store(no_cache: bool) -> DocumentCache | None:
    """Where documents are kept."""
    from leankv_mlx.documents.cache import DocumentCache

    return None if no_cache else DocumentCache(note)


@contextmanager
def reader(
    model: str | None,
    config: CompressionConfig | None,
    budget: int,
    no_cache: bool,
    lazy: bool = False,
) -> Iterator[Reader]:
    """The model, ready to read; `lazy` leaves its weights on the disk until they are used."""
    from leankv_mlx.documents.reader import opened_reader

    kept = store(no_cache)  # before anything slow
    with opened_reader(model, config, budget, kept, lazy=lazy) as made:
        yield made


class Waiting:
    """A bar on stderr while nothing is said; on a terminal only.

    Use it as a context manager, and `end` it before anything is written to stdout.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._part = ""
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def reading(self, done: int, total: int) -> None:
        """Tokens read so far."""
        self._show(f"reading {self._name}{self._part}", done, total)

    def part(self, done: int, total: int) -> None:
        """Partial summaries made so far."""
        self._part = f", part {min(done + 1, total)} of {total}"

    def end(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, text: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (TextColumn("{task.description}", markup=False), BarColumn(),
                       MofNCompleteColumn(), TimeRemainingColumn())  # fmt: skip
            self._progress = Progress(*columns, console=console(stderr=True), transient=True)
            self._task = self._progress.add_task(text, total=total)
            self._progress.start()
        self._progress.update(self._task, description=text, completed=done, total=total)
