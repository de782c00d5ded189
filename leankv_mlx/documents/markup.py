"""The tags and the text of a page, in order, in time that grows with its length and no faster.

Cut as the HTML standard cuts it, except where the standard loses the rest of a page: a comment, a
title, a script or a quotation mark that is never closed ends a browser's page, and counts for
nothing here. No tree is built: building one takes quadratic time and memory by the standard itself,
which opens all formatting elements again in every paragraph (24 KB of `<p><b id=1>` are a million
elements), and lists of text need none.
"""

from __future__ import annotations

import html
import re
from collections.abc import Container, Iterator
from typing import Literal

Token = tuple[Literal["text", "title", "start", "end"], str]
"""What it is, and its text or the name of its tag in lower case."""

_NAME = re.compile(r"</?([a-zA-Z][^\s/>]*)")
_PART = re.compile(r"""[^>=]+|=\s*(?:"[^"]*"|'[^']*'|(?![\s"']))""")
"""Of a tag what may come between its name and its end: no quotation mark that is never closed. A
pattern for all of it would need possessive quantifiers, which Python 3.11.2 gets wrong."""
_QUOTE = re.compile(r"=\s*[\"']")
_COMMENT_END = re.compile("--!?>")
_RAW = ("script", "style", "textarea", "title", "xmp")
_CLOSED = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in _RAW}
"""Elements without tags in them, and how they end."""
_UNSEEN = ("script", "style")
_LONGEST_TITLE = 1000
"""Characters; what is longer is a title that was not closed, and the page behind it."""
_LONGEST_CUT = 300
"""Characters of a tag that the end of the page cuts; what is longer is text with a `<` in it."""
_LONG_NUMBER = re.compile(r"&#0*\d{8,};?")


def tokens(source: str, names: Container[str]) -> Iterator[Token]:
    """The text of a page and those of its tags that are in `names`; scripts and styles are left
    out. A tag that closes itself, as `<iframe/>` does, opens nothing and is no token."""
    text_from = look_from = 0
    scan = _Scan(source, names)
    while (at := source.find("<", look_from)) >= 0:
        found, after = scan.construct(at)
        if not after:
            look_from = at + 1
            continue
        if text_from < at:
            yield "text", _unescaped(source[text_from:at])
        yield from found
        text_from = look_from = after
    if text_from < len(source):
        yield "text", _unescaped(source[text_from:])


class _Scan:
    """What begins at a `<`. It remembers what is closed nowhere any more, so that no end is looked
    for twice."""

    def __init__(self, source: str, names: Container[str]) -> None:
        self._source = source
        self._names = names
        self._ends: dict[str, int] = {}  # where the next one is, as far as it was looked for
        self._shared: dict[Token, Token] = {}  # a page may have millions of tags, and few names

    def construct(self, at: int) -> tuple[list[Token], int]:
        """The tokens, and where the text goes on; 0 if the `<` is text itself."""
        source = self._source
        if source.startswith("<!--", at):
            end = self._end("-->", at + 2)  # the two dashes may be those of the end, as in <!-->
            return [], end or at + 4
        if source.startswith("<![CDATA[", at):
            end = self._end("]]>", at + 9)
            return ([("text", source[at + 9 : end - 3])] if end else []), end or at + 9
        if (name := _NAME.match(source, at)) is not None:
            return self._tag(at, name)
        if source.startswith(("<!", "<?", "</"), at):
            return [], self._end(">", at + 2)
        return [], 0

    def _tag(self, at: int, found: re.Match[str]) -> tuple[list[Token], int]:
        source, name = self._source, found[1].lower()
        stop = _inside(source, found.end())
        if stop == len(source):
            if stop - at <= _LONGEST_CUT:
                return [], stop
            return [("text", _unescaped(source[at:]))], stop
        after = stop + 1
        if source.startswith("</", at):
            return self._told("end", name), after
        if source[stop - 1] == "/":
            return [], after
        if name in _CLOSED:
            return self._raw(name, after)
        return self._told("start", name), after

    def _raw(self, name: str, after: int) -> tuple[list[Token], int]:
        """An element whose content is text; if it is not closed, the page goes on in it."""
        end = self._end(name, after)
        if not end:
            return [], after
        content = self._source[after:end]
        if name in _UNSEEN:
            return [], end
        if name == "title":
            if len(content) > _LONGEST_TITLE:
                return [], after
            return [("title", _unescaped(content))], end
        return [*self._told("start", name), ("text", _unescaped(content))], end

    def _told(self, kind: Literal["start", "end"], name: str) -> list[Token]:
        if name not in self._names:
            return []
        token: Token = (kind, name)
        return [self._shared.setdefault(token, token)]

    def _end(self, what: str, start: int) -> int:
        """Behind the next end of a construct, or where the end tag of an element begins; 0 if
        there is none."""
        known = self._ends.get(what, start)
        if known == 0 or known > start:
            return known
        if what in _CLOSED:
            close = _CLOSED[what].search(self._source, start)
            end = close.start() if close else 0
        elif what == "-->":
            close = _COMMENT_END.search(self._source, start)
            end = close.end() if close else 0
        else:
            end = self._source.find(what, start) + len(what)
            end = end if end >= start + len(what) else 0
        self._ends[what] = end
        return end


def _inside(source: str, start: int) -> int:
    """Where a tag ends: at its `>`, or at the end of the page. A quotation mark that is never
    closed is one more character; it is the last of its kind, so looking for its end happens once
    for each kind."""
    stop = start
    while found := _PART.match(source, stop) or _QUOTE.match(source, stop):
        stop = found.end()
    return stop


def _unescaped(text: str) -> str:
    if "&" not in text:
        return text
    return html.unescape(_LONG_NUMBER.sub("\ufffd", text))  # Python refuses to read such numbers
