"""`leankv ask`: one question about one document, which opens at once the second time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli import reading
from leankv_mlx.config import parse_kv
from leankv_mlx.errors import UsageError
from leankv_mlx.terminal import note, say, say_json

if TYPE_CHECKING:
    from leankv_mlx.documents.reader import Answer, Reader


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("ask")(ask)


def ask(
    file: Annotated[str, typer.Argument(help="Path, http(s) address, or - for stdin.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: reading.Model = None,
    kv: reading.Kv = "leankv",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    memory_budget: reading.Budget = "",
    encoding: reading.Encoding = "",
    no_cache: reading.NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Answer a question about a document. Its compressed KV cache is kept, so that the next
    question about it starts at once."""
    config, budget = parse_kv(kv), reading.budget_bytes(memory_budget)
    if not question.strip():
        raise UsageError("the question is empty.")
    found = reading.document(file, encoding)
    with reading.reader(model, config, budget, no_cache) as reader:
        with reading.Waiting(found.name) as waiting:
            answer, pieces = reader.answer(
                found.text, question, max_tokens, found.name, waiting.reading
            )
            for piece in pieces:
                waiting.end()
                if not as_json:
                    say(piece, end="")
        if as_json:
            result = _as_dict(found.name, kv, reader, answer)
            say_json(result)
        else:
            say("")
    if not answer.complete:
        note(f"the answer was cut at {answer.tokens} tokens; raise --max-tokens.")


def _as_dict(name: str, kv: str, reader: Reader, answer: Answer) -> dict[str, Any]:
    return {
        "document": name,
        "model": reader.loaded.path.name,
        "kv": kv,
        "answer": answer.text.strip(),
        "complete": answer.complete,
        "time_to_first_token_s": answer.first_token_s,
        "tokens_per_second": answer.speed,
        "document_tokens": answer.document_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "cached": answer.cached,
        "document_kv_bytes": answer.document_usage.used,
        "kv_bytes": answer.usage.used,
        "kv_bytes_fp16": answer.usage.fp16,
        "backend": reader.backend,
        "weights_read": reader.weights_read,
    }
