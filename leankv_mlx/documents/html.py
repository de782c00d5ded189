"""The readable text of an HTML page: headings, paragraphs, lists and tables as Markdown."""

from __future__ import annotations

import codecs
import re
from html.parser import HTMLParser

from leankv_mlx.documents.text import decoded, tidied

_SKIPPED = {"script", "style", "noscript", "template", "svg", "iframe", "object", "nav", "head"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hr", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tr", "ul",
}  # fmt: skip
_OPEN = {"li": "- ", "blockquote": "> "} | {f"h{i}": "#" * i + " " for i in range(1, 7)}
_APART = _BLOCKS - {"li", "tr", "dd", "dt"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source",
         "track", "wbr"}  # fmt: skip
_CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE)
_MARKUP = re.compile(r"\s*(<!doctype\s+html|<html[\s>]|<\?xml[^>]*>\s*<!doctype\s+html)", re.I)


def is_html(raw: bytes) -> bool:
    """Whether bytes begin as a page does."""
    return _MARKUP.match(raw[:1024].decode("latin-1").lstrip("\ufeffï»¿")) is not None


def page_text(raw: bytes, name: str, encoding: str = "") -> tuple[str, str]:
    """The text of a page, and what should be said about it; see `decoded`.

    Args:
        encoding: what the user or the server says; else the page's own `charset`.
    """
    if not encoding and (found := _CHARSET.search(raw[:4096])):
        encoding = _known(found[1].decode("ascii"))
    source, note = decoded(raw, name, encoding)
    page = _Page()
    page.feed(source)
    page.close()
    return page.text(), note


def _known(encoding: str) -> str:
    """A page may name an encoding that does not exist; then it counts for nothing."""
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        return ""


class _Page(HTMLParser):
    """Collects text. Unclosed and stray tags change nothing but the line breaks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._title = ""
        self._parts: list[str] = []
        self._skipped: list[str] = []
        self._in_title = False
        self._preformatted = 0
        self._newlines = 2  # at the end of what there is; two at the beginning

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title" and not self._title:
            self._in_title = True
        elif tag == "body":
            self._skipped.clear()  # whatever in the head was not closed
        if self._skipped:
            if tag == self._skipped[-1]:
                self._skipped.append(tag)
        elif tag in _SKIPPED:
            self._skipped.append(tag)
        elif tag == "br":
            self._add("\n")
        elif tag in ("td", "th"):
            if not self._newlines:
                self._add(" | ")
        elif tag in _BLOCKS:
            self._break(tag)
            self._add(_OPEN.get(tag, ""))
        self._preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if self._skipped:
            if tag == self._skipped[-1]:
                self._skipped.pop()
        elif tag in _BLOCKS:
            self._break(tag)
        self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title += data
        if self._skipped:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if self._newlines or (self._parts and self._parts[-1].endswith(" ")):
                data = data.lstrip(" ")
        self._add(data)

    def _add(self, text: str) -> None:
        if text:
            self._parts.append(text)
            ending = len(text) - len(text.rstrip("\n"))
            self._newlines = ending + (self._newlines if ending == len(text) else 0)

    def _break(self, tag: str) -> None:
        self._add("\n" * max(0, (2 if tag in _APART else 1) - self._newlines))

    def text(self) -> str:
        """The title, unless the page begins with it, and the body."""
        body = tidied("".join(self._parts))
        title = " ".join(self._title.split())
        if not title or title in body[: len(title) + 8]:
            return body
        return f"{title}\n\n{body}"
