"""The readable text of an HTML page: headings, paragraphs, lists and tables as Markdown."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from leankv_mlx.documents.markup import Token, tokens
from leankv_mlx.documents.text import decoded, marked, tidied

_LEFT_OUT = {"iframe", "nav", "noscript", "object", "svg", "template"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details",
    "dialog", "dir", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form",
    "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr", "legend", "li", "main", "menu",
    "ol", "optgroup", "option", "p", "pre", "search", "section", "summary", "table", "textarea",
    "tr", "ul", "xmp", *_LEFT_OUT,
}  # fmt: skip
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_OPEN = {"li": "- ", "blockquote": "> ", **_HEADINGS}
_APART = _BLOCKS - {"dd", "dt", "li", "optgroup", "option", "tr"}
_PREFORMATTED = {"pre", "textarea", "xmp"}
_CELLS = {"td", "th"}
_NAMES = _BLOCKS | _CELLS | {"br"}
_CONTAINERS = {
    "article", "aside", "details", "div", "dl", "fieldset", "figure", "footer", "form", "header",
    "main", "ol", "section", "table", "td", "th", "ul",
}  # fmt: skip
"""Elements whose end is the end of all that was opened in them and not closed."""
_LONG_CELL = 1000
"""Characters from which on a cell of several lines is a part of a page that a table lays out."""
_WORTH_A_NOTE = 2000
"""Characters in what is left out of a page."""
_CHARSET = re.compile(
    rb"""<meta[^>]+?charset\s*=\s*["']?\s*([^"'\s;/>]+)|<\?xml[^>]+?encoding\s*=\s*["']([^"'>]+)""",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*|<!--(?:[^-]|-(?!->))*-->\s*)*(?:<!doctype\s+html|<html[\s>])",
    re.IGNORECASE,
)


def is_html(raw: bytes) -> bool:
    """Whether bytes begin as a page does, in any encoding that they are marked with."""
    start = raw[:1024].decode(marked(raw) or "latin-1", errors="ignore")
    return _MARKUP.match(start.removeprefix("\ufeff")) is not None


def page_text(raw: bytes, name: str, encoding: str = "", charset: str = "") -> tuple[str, str]:
    """The text of a page, and what should be said about it; see `decoded`.

    Menus, drawings and what stands in for them (`_LEFT_OUT`) are left out, but not one that is
    never closed, and not one that holds more than half of the page's text: it is the page.

    Args:
        encoding: what the user says.
        charset: what the server says; the page's own comes behind it.
    """
    source, note = decoded(raw, name, encoding, (charset, _said(raw)))
    without, lost = _left_out(tokens(source, _NAMES))
    page = _Page()
    page.read(_rest(tokens(source, _NAMES), without))
    notes = [note] if note else []
    if lost >= _WORTH_A_NOTE:
        notes.append(f"{lost:,} characters of menus and the like were left out of {name}.")
    return page.text(), " ".join(notes)


def _said(raw: bytes) -> str:
    """The encoding that a page names. What can be read as ASCII is not in two bytes a letter."""
    found = _CHARSET.search(raw[:4096])
    if not found:
        return ""
    label = (found[1] or found[2]).decode("ascii", errors="replace")
    return "utf-8" if label.lower().startswith("utf-16") else label


def _left_out(page: Iterable[Token]) -> tuple[list[tuple[int, int]], int]:
    """First and last token of what is left out, in order, and how many characters that are."""
    found: list[tuple[int, int, int]] = []
    opened: list[str] = []
    begun: list[tuple[int, int]] = []  # of the `_LEFT_OUT` in `opened`: token, characters before
    count: Counter[str] = Counter()
    total = 0
    for number, (kind, text) in enumerate(page):
        if kind == "text":
            total += len(text.strip())
        elif text not in _CONTAINERS and text not in _LEFT_OUT:
            continue
        elif kind == "start":
            opened.append(text)
            count[text] += 1
            if text in _LEFT_OUT:
                begun.append((number, total))
        elif count[text]:
            name = ""
            while name != text:
                name = opened.pop()
                count[name] -= 1
                start, before = begun.pop() if name in _LEFT_OUT else (0, 0)
            if text in _LEFT_OUT:
                found.append((start, number, total - before))
    without: list[tuple[int, int]] = []
    lost, last = 0, -1
    for start, end, characters in sorted(found):
        if start > last and characters * 2 <= total:
            without.append((start, end))
            lost, last = lost + characters, end
    return without, lost


def _rest(page: Iterator[Token], without: Sequence[tuple[int, int]]) -> Iterator[Token]:
    """The tokens that are not left out."""
    at = 0
    for start, end in without:
        yield from islice(page, start - at)
        at = end + 1
        next(islice(page, at - start, at - start), None)  # passes over them
    yield from page


class _Flow:
    """Text in lines, as it is collected."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._mark = ""
        self._newlines = 2  # at the end of what there is; two at the beginning
        self._spaced = False
        self.headed = False
        """Whether there is a heading, or lines that must stay lines."""

    def words(self, text: str) -> None:
        """Add text in which white space means nothing."""
        text = re.sub(r"\s+", " ", text)
        if self._newlines or self._spaced:
            text = text.lstrip(" ")
        self.add(text)

    def add(self, text: str) -> None:
        """Add text as it is."""
        if not text:
            return
        if self._mark and not text.isspace():
            text, self._mark = self._mark + text, ""
        self._text.write(text)
        ending = len(text) - len(text.rstrip("\n"))
        self._newlines = ending + (self._newlines if ending == len(text) else 0)
        self._spaced = text.endswith(" ")

    def end_line(self, empty: int) -> None:
        """End the line, and have so many empty ones behind it."""
        self.add("\n" * max(0, empty + 1 - self._newlines))

    def mark(self, mark: str) -> None:
        """What the next text begins with, such as "- "; it is lost if there is none."""
        self._mark = mark

    @property
    def in_line(self) -> bool:
        return not self._newlines

    def text(self) -> str:
        return tidied(self._text.getvalue())


class _Page:
    """Collects text. Unclosed and stray tags change nothing but the line breaks."""

    def __init__(self) -> None:
        self._title = ""
        self._body = _Flow()
        self._row: list[_Flow] = []  # the cells of the innermost table's row so far
        self._tables = 0
        self._preformatted = 0

    def read(self, page: Iterable[Token]) -> None:
        for kind, text in page:
            if kind == "text":
                self._words(text)
            elif kind == "start":
                self._start(text)
            elif kind == "end":
                self._end(text)
            else:
                self._title = self._title or " ".join(text.split())

    @property
    def _flow(self) -> _Flow:
        return self._row[-1] if self._row else self._body

    def _words(self, text: str) -> None:
        if not self._preformatted:
            return self._flow.words(text)
        self._flow.headed |= "\n" in text.strip()
        self._flow.add(text)

    def _start(self, tag: str) -> None:
        if tag == "br":
            self._flow.add("\n")
        elif tag in _CELLS:
            self._cell()
        elif tag in _BLOCKS:
            if tag == "table":
                self._end_row(of_page=True)
                self._tables += 1
            elif tag == "tr":
                self._end_row()
            self._flow.headed |= tag in _HEADINGS
            self._flow.end_line(tag in _APART)
            if tag in _OPEN:
                self._flow.mark(_OPEN[tag])
        self._preformatted += tag in _PREFORMATTED

    def _end(self, tag: str) -> None:
        if tag in ("tr", "table"):
            self._end_row()
        if tag == "table":
            self._tables = max(0, self._tables - 1)
        if tag in _BLOCKS:
            self._flow.end_line(tag in _APART)
        if tag in _OPEN:
            self._flow.mark("")
        self._preformatted = max(0, self._preformatted - (tag in _PREFORMATTED))

    def _cell(self) -> None:
        if self._tables:
            self._row.append(_Flow())
        elif self._flow.in_line:
            self._flow.add(" | ")

    def _end_row(self, of_page: bool = False) -> None:
        """Write the cells down: side by side in one line, or below each other where the row only
        lays out a page (it holds a table, long texts, or headings with text below them)."""
        cells = [(cell.text(), cell.headed) for cell in self._row]
        self._row = []
        if not any(text for text, _ in cells):
            return
        if of_page or len(cells) == 1 or any(_is_part_of_page(*cell) for cell in cells):
            for text, _ in cells:
                self._body.end_line(len(cells) > 1)
                self._body.add(text)
        else:
            self._body.end_line(0)
            self._body.add(" | ".join(" ".join(text.split()) for text, _ in cells).strip())
        self._body.end_line(0)

    def text(self) -> str:
        """The title, unless the page begins with it, and the body."""
        self._end_row()
        body = self._body.text()
        if not self._title or self._title in body[: len(self._title) + 8]:
            return body
        return f"{self._title}\n\n{body}"


def _is_part_of_page(text: str, headed: bool) -> bool:
    return "\n" in text and (headed or len(text) > _LONG_CELL)
