"""Cutting a long reply into parts that are laid out once.

Every piece of text that arrives makes its Markdown widget lay out all its blocks again. So a reply
is a row of widgets of about a screen each, and only the last one grows.
"""

from __future__ import annotations

import re

SIZE = 800
"""Characters after which the next chance to cut is taken."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_NEW_BLOCK = re.compile(r"(?![\s>|]|[-*+]\s|\d+[.)]\s)\S")
"""A line that cannot continue a list, a quote or a table."""


def segments(text: str) -> list[str]:
    """Parts that join to `text`; more text never changes any but the last."""
    parts: list[str] = []
    start = at = 0
    fence = ""
    blank = False
    for line in text.splitlines(keepends=True):
        complete = line.endswith("\n")
        if at - start >= SIZE and blank and not fence and complete and _NEW_BLOCK.match(line):
            parts.append(text[start:at])
            start = at
        if found := _FENCE.match(line):
            if not fence:
                fence = found[1]
            elif found[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        blank = not line.strip()
        at += len(line)
    return [*parts, text[start:]]
