"""Bytes of a text file as text."""

from __future__ import annotations

import codecs
import re

from leankv_mlx.errors import DocumentError, UsageError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FALLBACK = "cp1252"
_CONTROLS = bytes({*range(32)} - {*b"\t\n\f\r\x1b"})
_BINARY_SHARE = 0.01


def decoded(raw: bytes, name: str, encoding: str = "") -> tuple[str, str]:
    """The text of `raw`, and what should be said about it ("" for nothing).

    A byte order mark decides, else UTF-8. Other bytes are read as Windows-1252, a superset of
    Latin-1 in which every Western text is right, with a note, because another one may be meant.

    Args:
        encoding: the encoding, if it is known.

    Raises:
        DocumentError: it is no text, or not of this encoding.
        UsageError: there is no such encoding.
    """
    if encoding:
        return _named(raw, name, encoding), ""
    for mark, marked in _MARKS:
        if raw.startswith(mark):
            return _named(raw, name, marked), ""
    if _is_binary(raw):
        raise DocumentError(f"{name} is not a text, and not a kind of document that can be read.")
    try:
        return _clean(raw.decode("utf-8")), ""
    except UnicodeDecodeError:
        text = raw.decode(_FALLBACK, errors="replace")
    note = f"{name} is not UTF-8 and was read as Windows-1252; give --encoding if that is wrong."
    return _clean(text), note


def _named(raw: bytes, name: str, encoding: str) -> str:
    try:
        return _clean(raw.decode(encoding))
    except LookupError:
        raise UsageError(f"there is no encoding {encoding}; utf-8 or shift_jis, say.") from None
    except (UnicodeError, ValueError) as error:
        raise DocumentError(f"{name} is not {encoding}; give its --encoding.") from error


def _is_binary(raw: bytes) -> bool:
    start = raw[:65536]
    if b"\0" in start:
        return True
    return len(start) - len(start.translate(None, _CONTROLS)) > len(start) * _BINARY_SHARE


def _clean(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def tidied(text: str) -> str:
    """Without spaces at line ends, and at most one empty line in a row."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()
