"""The text of a PDF, page by page, through PDFium."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from leankv_mlx.documents.text import tidied
from leankv_mlx.errors import DocumentError

_PASSWORD = 4
"""PDFium's FPDF_ERR_PASSWORD."""
_HEADER = re.compile(rb"%PDF-\d\.\d[ \t]*[\r\n%]")
_SCANNED_LETTERS = 16
"""A page with an image and fewer letters is taken for a picture of a page."""
_SHORT_LINE = 40
"""A line of at most so many characters is never wrapped: it is an entry of a list, or a title."""
_SAME_EDGE = 3.0
"""Points in which left edges of one column differ."""
_COLUMN_GAP = 2.5
"""Widths of a line's characters from which on a space separates two columns of a table."""
_HYPHEN = "\ufffe"
"""What PDFium gives for a hyphen at the end of a line, whoever has put it there, and no line end
behind it."""
_SPLIT = re.compile(rf"(\w+){_HYPHEN}(\w+)")
_ITEM = re.compile(
    r"(?:\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{2,5})(?:\.\d{1,3})*[.)]|[^\w\s\"'“\u2018«(\[$€£<]+)\s"
)
_CODE = re.compile(
    r"[{};]$|^[#@}]|[\w\])] ?(?:[-+*/%&|<>!=]?=|=>|->|:=|\|\||&&|::) ?\S|\w\([^)]*\):?$|"
    r"^(?:def|class|return|import|from \S+ import|function|const|let|var|public|private|elif)\b.*"
    r"[:;({=]|^\$ |^>>> |//|/\*|\*/"
)


def is_pdf(raw: bytes) -> bool:
    """Whether it is one, and no text about one: with a header, its version, and objects, and where
    something else comes first, only what PDFium opens."""
    header = _HEADER.search(raw[:1024])
    if header is None or b" obj" not in raw:
        return False
    if not raw[: header.start()].removeprefix(b"\xef\xbb\xbf").strip():
        return True
    import pypdfium2

    try:
        pypdfium2.PdfDocument(raw).close()
    except pypdfium2.PdfiumError as error:
        return getattr(error, "err_code", None) == _PASSWORD
    return True


def pdf_text(raw: bytes, name: str) -> tuple[str, str]:
    """The text of all pages, and what should be said about it.

    A line is joined to the next one only where it is plain that the text runs on, see `_runs_on`.
    A word that is split at the end of a line loses the hyphen if the document elsewhere writes it
    without one and never with one. Else it keeps it, `well-being` as `infor-mation`: PDFium does
    not say which hyphens are the typesetter's.

    Raises:
        DocumentError: it is encrypted, damaged, or has no text.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(raw)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == _PASSWORD:
            raise DocumentError(
                f"{name} is encrypted; save a copy without a password (qpdf --decrypt)."
            ) from error
        raise DocumentError(f"{name} is damaged or no PDF ({error}).") from error
    try:
        pages, scanned = [], 0
        for number in range(len(document)):
            try:
                text, image = _page(document[number], pypdfium2.raw.FPDF_PAGEOBJ_IMAGE)
            except pypdfium2.PdfiumError as error:
                raise DocumentError(f"page {number + 1} of {name} is damaged.") from error
            pages.append(text)
            scanned += image and sum(map(str.isalnum, text)) < _SCANNED_LETTERS
    finally:
        document.close()
    text = tidied(_unsplit("\n\n".join(pages)))
    if scanned and scanned * 2 >= len(pages):
        raise DocumentError(
            f"{name} is scanned: {scanned} of its {len(pages)} pages are pictures without text; "
            "run a text recognition first (ocrmypdf)."
        )
    if not text:
        raise DocumentError(f"{name} has {len(pages)} pages and no text in them.")
    note = f"{scanned} of {len(pages)} pages of {name} are pictures without text."
    return text, note if scanned else ""


def _page(page: Any, image_type: int) -> tuple[str, bool]:
    """Its text, and whether there is an image on it."""
    try:
        words = page.get_textpage()
        try:
            text = _joined(list(_lines(words)))
        finally:
            words.close()
        image = any(page.get_objects(filter=[image_type], max_depth=2))
    finally:
        page.close()
    return text, image


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a page. `left`, `right` and the width of its first word are in points; `columns`
    says whether there are gaps in it as between the columns of a table."""

    text: str
    left: float
    right: float
    first_word: float
    columns: bool


def _lines(words: Any) -> Iterator[_Line]:
    """The lines of a page as PDFium orders them; what a hyphen ends is a line too."""
    text = words.get_text_range()
    places = len(text) == words.count_chars()  # else characters and boxes are not in step
    for found in re.finditer(rf"[^\r\n{_HYPHEN}]*{_HYPHEN}?", text):
        line = found[0].strip()
        if not line:
            continue
        start = found.start() + len(found[0]) - len(found[0].lstrip())
        if not places:
            yield _Line(line, 0.0, float(len(line)), float(len(line.split()[0])), False)
            continue
        left, right = _edge(words, start, 0), _edge(words, start + len(line) - 1, 2)
        first = _edge(words, start + len(line.split()[0]) - 1, 2) - left
        yield _Line(line, left, right, first, _has_columns(words, line, start, right - left))


def _edge(words: Any, index: int, side: int) -> float:
    """The left (0) or right (2) edge of a character."""
    return float(words.get_charbox(index)[side])


def _has_columns(words: Any, line: str, start: int, width: float) -> bool:
    gap = _COLUMN_GAP * width / len(line)
    spaces = (start + space.start() for space in re.finditer(r"(?<=\S) (?=\S)", line))
    return any(_edge(words, at + 1, 0) - _edge(words, at - 1, 2) > gap for at in spaces)


def _joined(lines: Sequence[_Line]) -> str:
    """The text of a page; only white space changes."""
    margins: dict[int, float] = {}
    for line in lines:
        edge = round(line.left / _SAME_EDGE)
        margins[edge] = max(margins.get(edge, 0.0), line.right)
    parts = []
    for line, after in pairwise(lines):
        parts.append(line.text)
        if not line.text.endswith(_HYPHEN):
            edges = (round(x.left / _SAME_EDGE) + by for x in (line, after) for by in (-1, 0, 1))
            margin = max(margins.get(edge, 0.0) for edge in edges)
            parts.append(" " if _runs_on(line, after, margin) else "\n")
    return "".join([*parts, *(line.text for line in lines[-1:])])


def _runs_on(line: _Line, after: _Line, margin: float) -> bool:
    """Whether a line was only ended because the first word of the next did not fit any more.

    Never where one of them is short, code or a row of a table, and never before the next entry of
    a list or a line that is indented further (but for what hangs below an entry).
    """
    if len(line.text) <= _SHORT_LINE or line.columns or after.columns:
        return False
    space = 2 * (line.right - line.left) / len(line.text)  # a word of the next line has one before
    if line.right + space + after.first_word < margin:
        return False
    if _ITEM.match(after.text) or any(_CODE.search(x.text) for x in (line, after)):
        return False
    if after.left > line.left + _SAME_EDGE and not _ITEM.match(line.text):
        return False
    return not _is_row(line.text) and not _is_row(after.text)


def _is_row(text: str) -> bool:
    """Whether half of a line's words are numbers, or its last two."""
    numbers = [any(map(str.isdigit, word)) for word in text.split()]
    return sum(numbers) * 2 >= len(numbers) or numbers[-2:] == [True, True]


def _unsplit(text: str) -> str:
    """With the halves of split words put together."""
    text = text.replace("\u00ad", "")
    if _HYPHEN not in text:
        return text
    words = set(re.findall(r"\w+(?:-\w+)*", text.casefold()))

    def whole(found: re.Match[str]) -> str:
        joined, split = f"{found[1]}{found[2]}", f"{found[1]}-{found[2]}"
        plain = joined.casefold() in words and split.casefold() not in words
        return joined if plain else split

    return _SPLIT.sub(whole, text).replace(_HYPHEN, "-")
