"""What of Markdown is read in the text of a model.

The text is a model's words, never HTML: whatever could hide a part of it is off. Tags, entities
and comments are shown as they are written, and so are addresses, because what a link would hide
is where it goes. Where Markdown itself drops text (below), it is kept.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, blockquote, fence, list_block, table

if TYPE_CHECKING:
    from markdown_it.ruler import RuleOptionsType

DEEPEST = 12
"""Levels of quotes and lists, counted as markdown-it does; it drops what is nested beyond its own
limit of 20, so what is deeper than this is text."""

_HIDES = ("html_block", "html_inline", "entity", "autolink", "link", "image", "linkify",
          "reference")  # fmt: skip
_CELL_END = re.compile(r"(?<!\\)\|")
_LANGUAGE = re.compile(r"[\w+#.-]*")


@cache
def parser() -> MarkdownIt:
    """The parser of all replies."""
    made = MarkdownIt("gfm-like", {"html": False, "linkify": False}).disable(_HIDES)
    ends_paragraph: RuleOptionsType = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    made.block.ruler.at("blockquote", _quote, ends_paragraph)
    made.block.ruler.at("list", _list, {"alt": ["paragraph", "reference", "blockquote"]})
    made.block.ruler.at("fence", _fence, ends_paragraph)
    made.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    return made


def _quote(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    return state.level < DEEPEST and blockquote(state, start, end, silent)


def _list(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    return state.level < DEEPEST and list_block(state, start, end, silent)


def _fence(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A block of code; what stands behind the fence is shown where it names no language."""
    if not fence(state, start, end, silent):
        return False
    if not silent:
        code = state.tokens[-1]
        info = code.info.strip()
        if not _LANGUAGE.fullmatch(info):
            code.content = f"{info}\n{code.content}"
    return True


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A table; cells beyond those of its head, which Markdown drops, go to the last one."""
    first = len(state.tokens)
    if not table(state, start, end, silent):
        return False
    cells = [token for token in state.tokens[first:] if token.type == "inline"]
    columns = sum(cell.map == [start, start + 1] for cell in cells)
    for last in cells[columns - 1 :: columns] if cells else ():
        line = last.map[0] if last.map else start
        row = _cells(state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]])
        if len(row) > columns:
            last.content = " | ".join(row[columns - 1 :])
    return True


def _cells(line: str) -> list[str]:
    """The cells of a row, as the rule for tables cuts it."""
    cells = [cell.strip() for cell in _CELL_END.split(line.strip())]
    return cells[not cells[0] : len(cells) - (not cells[-1])]
