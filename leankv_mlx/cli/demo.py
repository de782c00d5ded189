"""`leankv demo`: one document, its questions, the uncompressed cache beside the compressed one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli.console import console
from leankv_mlx.cli.reading import Model
from leankv_mlx.terminal import say_json

if TYPE_CHECKING:
    from leankv_mlx.evaluation.demo import Demo


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("demo")(demo)


def demo(
    kv: Annotated[str, typer.Option(help="Setting of the compressed cache.")] = "leankv",
    tokens: Annotated[
        int | None,
        typer.Option(help="Length of the document (default: 3000; of another model 1000)."),
    ] = None,
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Another number gives another document.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Ask a model about facts hidden in a document, with and without compression."""
    from leankv_mlx.config import CompressionConfig

    config = CompressionConfig.parse(kv)  # before anything slow
    from leankv_mlx.evaluation.demo import run_demo

    with nullcontext() if as_json else _waiting():
        result = run_demo(model, config, tokens, seed)
    if as_json:
        say_json(result.as_dict())
    else:
        _show(result)


def _waiting() -> Any:
    return console(stderr=True).status("reading the document and asking, once per cache ...")


def _show(result: Demo) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    arms = result.arms
    out.print(
        f"{result.model}: a document of {result.document_tokens} tokens, "
        f"{len(result.questions)} questions about it\n",
        markup=False,
        highlight=False,
    )
    answers = Table("question", *(arm.title for arm in arms), show_lines=True)
    for question in result.questions:
        cells = [
            Text.assemble((answer.mark, "green" if answer.score == 1 else "red"), f" {answer.text}")
            for answer in question.answers
        ]
        asked = Text.assemble(question.text, "\n", (f"expected: {question.expected}", "dim"))
        answers.add_row(asked, *cells)
    out.print(answers)
    numbers = Table("", *(arm.title for arm in arms))
    for name, values in result.numbers():
        numbers.add_row(name, *values)
    out.print(numbers)
    out.print(result.conclusion, markup=False, highlight=False)
