"""`leankv summarize`, and `leankv-summarize`: result on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli import reading
from leankv_mlx.cli.running import run_command
from leankv_mlx.config import parse_kv
from leankv_mlx.errors import DocumentError, UsageError
from leankv_mlx.terminal import json_text, note, printable, say, say_json

if TYPE_CHECKING:
    from leankv_mlx.documents.planning import Plan
    from leankv_mlx.documents.reader import Reader
    from leankv_mlx.documents.readers import Document
    from leankv_mlx.documents.summary import Summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def register(app: typer.Typer) -> None:
    """Add it to the commands of `leankv` too."""
    app.command("summarize")(summarize)


class Length(StrEnum):
    """How much a summary says."""

    short = "short"
    medium = "medium"
    long = "long"


class Format(StrEnum):
    """How it is written."""

    md = "md"
    text = "text"
    json = "json"


class Strategy(StrEnum):
    """Whether the document is read as a whole."""

    auto = "auto"
    single = "single"
    map_reduce = "map-reduce"


@app.command()
def summarize(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH|URL|-]...",
            help="Text, Markdown, HTML, PDF; docx, pptx, xlsx, epub with the extra docs. "
            "Without any: stdin.",
        ),
    ] = None,
    model: reading.Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result to a file.")
    ] = None,
    length: Annotated[Length, typer.Option(help="How much to say.")] = Length.medium,
    format: Annotated[Format, typer.Option(help="Form of the result.")] = Format.md,
    strategy: Annotated[
        Strategy,
        typer.Option(help="One pass, or pieces first; auto takes pieces only if it has to."),
    ] = Strategy.auto,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=16, help="Longest summary.", show_default="128, 512 or 1536 by length"),
    ] = None,
    kv: reading.Kv = "leankv",
    memory_budget: reading.Budget = "",
    encoding: reading.Encoding = "",
    no_cache: reading.NoCache = False,
    stats: Annotated[bool, typer.Option("--stats", help="Numbers on stderr at the end.")] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print a summary when it is complete.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say tokens, KV bytes and strategy; read nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    version: reading.Version = False,
    debug: reading.Debug = False,
) -> None:
    """Summarize documents, each in one pass over the whole if it fits the memory budget."""
    config, budget = parse_kv(kv), reading.budget_bytes(memory_budget)
    form = Format.json if as_json else format
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UsageError(f"cannot write {output}; name a file in a folder that exists.")
    if not sources and sys.stdin.isatty():
        raise UsageError("name a file or an address, or pipe a text in; see --help.")
    documents = [reading.document(source, encoding) for source in sources or ["-"]]
    with reading.reader(model, config, budget, no_cache, lazy=dry_run) as reader:
        if dry_run:
            _plan(reader, documents, length.value, strategy.value, max_tokens, form)
            return
        printer = _Printer(form, output, len(documents), stream=not no_stream)
        try:
            for document in documents:
                made = _one(reader, document, length.value, strategy.value, max_tokens, printer)
                if stats:
                    _stats(made, reader)
        finally:  # an error or Ctrl+C leaves what is complete
            printer.finish()


def _one(
    reader: Reader,
    document: Document,
    length: Any,
    strategy: Any,
    max_tokens: int | None,
    printer: _Printer,
) -> Summary:
    from leankv_mlx.documents.summary import Interrupted, Listener, summarize

    with reading.Waiting(document.name) as waiting:

        def text(piece: str) -> None:
            waiting.end()
            printer.piece(piece)

        printer.begin(document.name)
        listener = Listener(text, waiting.reading, waiting.part)
        try:
            made = summarize(reader, document, length, strategy, max_tokens, listener)
        except Interrupted as stopped:
            waiting.end()
            note(
                f"stopped; partial summaries kept: {stopped.kept}. "
                "The same command goes on from there."
            )
            raise
    printer.end(made)
    if not made.answer.complete:
        note(f"the summary was cut at {made.answer.tokens} tokens; raise --max-tokens.")
    return made


class _Printer:
    """Results in the form that is asked for: on stdout as they come, or in a file at the end."""

    def __init__(self, form: Format, output: Path | None, documents: int, stream: bool) -> None:
        self._form = form
        self._output = output
        self._several = documents > 1
        self._stream = stream and output is None and form is not Format.json
        self._made: list[Summary] = []

    def begin(self, name: str) -> None:
        """A document comes next."""
        if self._stream:
            say(self._heading(name), end="")

    def piece(self, text: str) -> None:
        """A piece of its summary."""
        if self._stream:
            say(text, end="")

    def end(self, made: Summary) -> None:
        """It is complete."""
        if self._stream:
            say("")
        elif self._output is None and self._form is not Format.json:
            say(f"{self._heading(made.name)}{made.text}")
        self._made.append(made)

    def finish(self) -> None:
        """Nothing more comes."""
        if not self._made:
            return
        if self._form is Format.json:
            rows = [made.as_dict() for made in self._made]
            result = json_text(rows if self._several else rows[0])
        else:
            texts = (f"{self._heading(made.name, i)}{made.text}\n" for i, made
                     in enumerate(self._made))  # fmt: skip
            result = "".join(texts).rstrip("\n")
        if self._output is not None:
            _write(self._output, f"{result}\n")
        elif self._form is Format.json:
            print(result)

    def _heading(self, name: str, index: int | None = None) -> str:
        if not self._several:
            return ""
        before = "\n" if (len(self._made) if index is None else index) else ""
        return f"{before}## {name}\n\n" if self._form is Format.md else f"{before}{name}\n\n"


def _write(path: Path, text: str) -> None:
    from leankv_mlx.atomic import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise DocumentError(
            f"cannot write {path}: {error.strerror or error}; name another file or make room."
        ) from error


def _plan(
    reader: Reader,
    documents: Sequence[Document],
    length: Any,
    strategy: Any,
    max_tokens: int | None,
    form: Format,
) -> None:
    from leankv_mlx.documents.planning import plan

    plans = [plan(reader, d.text, length, strategy, max_tokens) for d in documents]
    if form is Format.json:
        rows = [
            {
                "document": document.name,
                **asdict(found),
                "uncompressed_fits": found.uncompressed_fits,
            }
            for document, found in zip(documents, plans, strict=True)
        ]
        say_json(rows if len(rows) > 1 else rows[0])
        return
    for document, found in zip(documents, plans, strict=True):
        say(_described(document.name, found))


def _described(name: str, found: Plan) -> str:
    how = (
        "one pass" if found.strategy == "single" else f"{found.pieces} pieces, then their summaries"
    )
    fits = "fits" if found.uncompressed_fits else "does not fit"
    return (
        f"{name}: {found.tokens:,} tokens and a summary of up to {found.max_tokens:,}; KV "
        f"{found.kv_bytes / 1e6:.2f} MB, uncompressed {found.uncompressed_bytes / 1e6:.2f} MB "
        f"({fits}), budget {found.budget / 1e6:.2f} MB, longest {found.longest:,} tokens; {how}"
    )


def _stats(made: Summary, reader: Reader) -> None:
    from leankv_mlx.mlx_lm.usage import summary_line

    answer = made.answer
    rounds = f" of {' then '.join(map(str, made.rounds))} pieces" if made.rounds else ""
    read = "opened" if answer.cached else "read"
    lines = (
        f"leankv: {made.name}: {made.strategy}{rounds}, {answer.document_tokens} tokens {read}, "
        f"first token after {answer.first_token_s:.2f} s, {answer.tokens} tokens at "
        f"{answer.speed:.1f} tokens/s",
        summary_line(answer.usage, reader.backend, reader.weights_read),
    )
    sys.stdout.flush()
    for line in lines:
        print(printable(line), file=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_command(app, "leankv-summarize", arguments)


def main() -> None:
    """Entry point of the `leankv-summarize` script."""
    sys.exit(run(sys.argv[1:]))
