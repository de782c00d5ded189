"""How a document will be summarized: in one pass if it fits, else piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leankv_mlx.documents.chunks import chunks
from leankv_mlx.documents.reader import Reader
from leankv_mlx.documents.readers import document_head
from leankv_mlx.errors import ContextLengthError

Length = Literal["short", "medium", "long"]
Strategy = Literal["single", "map-reduce"]
Wanted = Literal["auto", "single", "map-reduce"]

INSTRUCTIONS: dict[Length, str] = {
    "short": "Summarize the document in one or two sentences.",
    "medium": "Summarize the document.",
    "long": "Summarize the document in detail, section by section.",
}
REPLY_TOKENS: dict[Length, int] = {"short": 128, "medium": 512, "long": 1536}
PARTIAL = INSTRUCTIONS["medium"]
"""What is asked about a piece."""
_PARTIAL_SHARE = 5
"""A partial summary has at most a fifth of what fits, so that every round has less to read."""
_SMALLEST_PIECE = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done with one document.

    Attributes:
        tokens: of the document with its instruction; an estimate if they do not fit.
        max_tokens: of the summary.
        kv_bytes: in use at the end of one pass over the whole.
        uncompressed_bytes: the same with the model's own caches.
        budget: bytes that a cache may take.
        longest: tokens of prompt and reply that fit the budget and the model.
        pieces: how many parts are summarized first; 1 for a single pass.
    """

    strategy: Strategy
    tokens: int
    max_tokens: int
    kv_bytes: int
    uncompressed_bytes: int
    budget: int
    longest: int
    pieces: int

    @property
    def uncompressed_fits(self) -> bool:
        """Whether one pass would fit the budget without compression."""
        return self.uncompressed_bytes <= self.budget


def plan(reader: Reader, text: str, length: Length, wanted: Wanted, max_tokens: int | None) -> Plan:
    """Decide how to summarize a text.

    Raises:
        ContextLengthError: one pass is wanted and does not fit, or not even a small piece fits.
    """
    most = max_tokens or REPLY_TOKENS[length]
    tokens = reader.prompt_tokens(document_head(text) + INSTRUCTIONS[length])
    longest = reader.longest
    single = tokens + most <= longest
    if wanted == "single" and not single:
        reader.check(tokens, most)  # says which limit it is, if there is no room at all
        raise ContextLengthError(
            f"the document has {tokens} tokens, a summary up to {most}, and {longest} fit; "
            "lower --max-tokens, raise --memory-budget, or use --strategy auto."
        )
    strategy: Strategy = "single" if single and wanted != "map-reduce" else "map-reduce"
    pieces = 1 if strategy == "single" else len(pieces_of(reader, text, most))
    return Plan(
        strategy,
        tokens,
        most,
        reader.footprint.used(tokens + most),
        reader.footprint.uncompressed(tokens + most),
        reader.budget,
        longest,
        pieces,
    )


def partial_tokens(reader: Reader, max_tokens: int) -> int:
    """Longest partial summary."""
    return min(max_tokens, reader.longest // _PARTIAL_SHARE)


def pieces_of(reader: Reader, text: str, max_tokens: int) -> list[str]:
    """A text in pieces that fit with a partial summary each.

    Raises:
        ContextLengthError: there is no room for a piece worth summarizing.
    """
    around = len(partial_prompt(reader, ""))
    limit = reader.longest - around - partial_tokens(reader, max_tokens)
    while limit >= _SMALLEST_PIECE:
        found = chunks(text, limit, reader.count)
        # Within a prompt a text may be a few tokens more than by itself.
        excess = max(len(partial_prompt(reader, piece)) for piece in found) - around - limit
        if excess <= 0:
            return found
        limit -= excess
    raise ContextLengthError(
        f"only {reader.longest} tokens fit into {reader.budget / 1e6:.1f} MB of KV cache; "
        "raise --memory-budget, or use fewer bits (--kv leankv:k3v3)."
    )


def partial_prompt(reader: Reader, piece: str) -> list[int]:
    """What asks for the summary of a piece."""
    return reader.prompt(document_head(piece) + PARTIAL)
