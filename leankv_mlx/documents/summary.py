"""Summaries: one pass over the whole document, or of its pieces and then of their summaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from leankv_mlx.documents.partials import Partials
from leankv_mlx.documents.planning import (
    INSTRUCTIONS,
    PARTIAL,
    Length,
    Plan,
    Strategy,
    Wanted,
    partial_prompt,
    partial_tokens,
    pieces_of,
    plan,
)
from leankv_mlx.documents.reader import Answer, Reader
from leankv_mlx.documents.readers import Document, document_head
from leankv_mlx.errors import ModelError
from leankv_mlx.mlx_lm.stored_prompts import model_identity
from leankv_mlx.serving.keys import kv_name


@dataclass(frozen=True, slots=True)
class Listener:
    """What is told about a summary on its way.

    Attributes:
        text: a piece of the summary itself.
        reading: tokens of the document, or of the part in hand, read so far, and their number.
        part: partial summaries that are done, and their number in this round.
    """

    text: Callable[[str], None] = lambda text: None
    reading: Callable[[int, int], None] = lambda done, total: None
    part: Callable[[int, int], None] = lambda done, total: None


@dataclass
class Summary:
    """One summary.

    Attributes:
        name: of the document.
        strategy: what was done; a document that fits may be asked for in pieces.
        answer: the last generation, which is the summary.
        rounds: pieces of each round of partial summaries; none for a single pass.
        resumed: partial summaries that an interrupted run had left.
    """

    name: str
    strategy: Strategy
    answer: Answer
    rounds: list[int] = field(default_factory=list)
    resumed: int = 0

    @property
    def text(self) -> str:
        """The summary."""
        return self.answer.text.strip()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes and times are those of the last generation."""
        answer = self.answer
        return {
            "document": self.name,
            "summary": self.text,
            "strategy": self.strategy,
            "rounds": self.rounds,
            "resumed": self.resumed,
            "complete": answer.complete,
            "prompt_tokens": answer.prompt_tokens,
            "document_tokens": answer.document_tokens,
            "tokens": answer.tokens,
            "cached": answer.cached,
            "kv_bytes": answer.usage.used,
            "kv_bytes_fp16": answer.usage.fp16,
            "ratio": answer.usage.ratio,
            "time_to_first_token_s": answer.first_token_s,
            "tokens_per_second": answer.speed,
        }


class Interrupted(KeyboardInterrupt):
    """Ctrl+C while pieces were summarized; `kept` partial summaries need not be made again."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept


def summarize(
    reader: Reader,
    document: Document,
    length: Length = "medium",
    wanted: Wanted = "auto",
    max_tokens: int | None = None,
    listener: Listener | None = None,
) -> Summary:
    """Summarize a document, greedily.

    Raises:
        ContextLengthError: it does not fit, see `plan`.
        ModelError: the partial summaries of the model do not get shorter than what they are of.
        Interrupted: Ctrl+C in a run of several pieces.
    """
    listener = listener or Listener()
    found = plan(reader, document.text, length, wanted, max_tokens)
    question = INSTRUCTIONS[length]
    if found.strategy == "single":
        answer = _said(reader, document.text, question, found.max_tokens, document.name, listener)
        return Summary(document.name, "single", answer)
    partials = Partials([document.digest, model_identity(reader.loaded.path),
                         kv_name(reader.config)])  # fmt: skip
    rounds: list[int] = []
    try:
        text = _reduced(reader, document.text, found, question, partials, rounds, listener)
        answer = _said(reader, text, question, found.max_tokens, "", listener)
    except KeyboardInterrupt as error:
        raise Interrupted(partials.kept) from error
    partials.done()
    return Summary(document.name, "map-reduce", answer, rounds, partials.reused)


def _reduced(
    reader: Reader,
    text: str,
    found: Plan,
    question: str,
    partials: Partials,
    rounds: list[int],
    listener: Listener,
) -> str:
    """Round after round of partial summaries, until what is left fits into one pass."""
    while True:
        pieces = pieces_of(reader, text, found.max_tokens)
        rounds.append(len(pieces))
        texts = []
        for index, piece in enumerate(pieces):
            listener.part(index, len(pieces))
            texts.append(_partial(reader, piece, found.max_tokens, partials, listener))
        listener.part(len(pieces), len(pieces))
        shorter = "\n\n".join(texts)
        tokens = reader.prompt_tokens(document_head(shorter) + question)
        if tokens + found.max_tokens <= found.longest:
            return shorter
        if reader.count(shorter) >= reader.count(text):
            raise ModelError(
                "the model's summaries are as long as the text; use a model that can summarize."
            )
        text = shorter


def _partial(
    reader: Reader, piece: str, max_tokens: int, partials: Partials, listener: Listener
) -> str:
    prompt, limit = partial_prompt(reader, piece), partial_tokens(reader, max_tokens)
    text = partials.find(prompt, limit)
    if text is None:
        quiet = Listener(reading=listener.reading)
        text = _said(reader, piece, PARTIAL, limit, "", quiet).text.strip()
        partials.keep(prompt, limit, text)
    return text


def _said(
    reader: Reader, text: str, question: str, max_tokens: int, name: str, listener: Listener
) -> Answer:
    answer, pieces = reader.answer(text, question, max_tokens, name, listener.reading)
    for piece in pieces:
        listener.text(piece)
    return answer
