"""Cutting a text into pieces of at most so many tokens, at paragraphs wherever possible."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Count = Callable[[str], int]
"""Tokens of a text."""

# From the places where a text is best cut to those where it may be cut if nothing else helps.
_SPLITS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?…。！？])\s+|(?<=[。！？])"),  # noqa: RUF001 full-width marks end sentences
    re.compile(r"\s+"),
)
_JOINS = ("\n\n", "\n", " ", " ", "")


def chunks(text: str, limit: int, count: Count) -> list[str]:
    """Consecutive pieces that hold all of a text but the white space between them.

    Neighbours are joined while they fit, so two of them are together hardly less than `limit`.

    Args:
        limit: tokens of a piece as `count` counts them; at least 1.
    """
    found: list[tuple[str, int]] = []
    for level, piece in _pieces(text, limit, count, 0):
        size = count(piece)
        if found:
            join = _JOINS[level]
            together = found[-1][1] + count(join) + size
            if together <= limit:
                found[-1] = (found[-1][0] + join + piece, together)
                continue
        found.append((piece, size))
    # A sum is not exactly what the whole has: cut again where it was less.
    return [part for piece, _ in found for part in _within(piece, limit, count)]


def _within(piece: str, limit: int, count: Count) -> list[str]:
    return [piece] if count(piece) <= limit else chunks(piece, max(1, limit * 4 // 5), count)


def _pieces(text: str, limit: int, count: Count, level: int) -> Iterator[tuple[int, str]]:
    """Pieces that fit, each with the level at which it was cut from the one before."""
    if level == len(_SPLITS):
        for piece in _cut(text, limit, count):
            yield level, piece
        return
    for index, part in enumerate(filter(None, map(str.strip, _SPLITS[level].split(text)))):
        if count(part) <= limit:
            yield level, part
            continue
        for inner, (deeper, piece) in enumerate(_pieces(part, limit, count, level + 1)):
            yield (level if not inner and index else deeper), piece


def _cut(word: str, limit: int, count: Count) -> Iterator[str]:
    """A word without spaces, or a text of a language that has none, in halves until they fit."""
    if count(word) <= limit or len(word) == 1:
        yield word
        return
    middle = len(word) // 2
    yield from _cut(word[:middle], limit, count)
    yield from _cut(word[middle:], limit, count)
