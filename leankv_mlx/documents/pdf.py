"""The text of a PDF, page by page, through PDFium."""

from __future__ import annotations

import re
from typing import Any

from leankv_mlx.documents.text import tidied
from leankv_mlx.errors import DocumentError

_PASSWORD = 4
"""PDFium's FPDF_ERR_PASSWORD."""
_SCANNED_LETTERS = 16
"""A page with an image and fewer letters is taken for a picture of a page."""
_WRAPPED = 0.75
"""Share of the page's longest line from which on a line counts as wrapped, not ended."""
_SHORT_LINE = 40
"""A line of at most so many characters is never wrapped: it is an entry of a list, or a title."""


def pdf_text(raw: bytes, name: str) -> tuple[str, str]:
    """The text of all pages, and what should be said about it.

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
    text = tidied("\n\n".join(pages))
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
            text = words.get_text_range()
        finally:
            words.close()
        image = any(page.get_objects(filter=[image_type], max_depth=2))
    finally:
        page.close()
    return _unwrapped(text), image


def _unwrapped(text: str) -> str:
    """Lines that fill the width of the page are joined to the next; only white space changes."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub("[\ufffe\u00ad]\n?", "", text)  # a hyphen that the typesetter has put in
    lines = [line.strip() for line in text.split("\n")]
    full = max(_SHORT_LINE, _WRAPPED * max(map(len, lines)))
    return "".join(line + (" " if len(line) > full else "\n") for line in lines).strip()
