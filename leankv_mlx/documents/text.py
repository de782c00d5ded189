"""Bytes of a text file as text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass

import webencodings

from leankv_mlx.errors import DocumentError, UsageError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FALLBACK = "cp1252"
_WIDER = {"gbk": "gb18030", "euc-jp": "euc_jis_2004", "euc_jp": "euc_jis_2004"}
"""Of Python's codecs those that have every character which a browser reads under the same name."""
_NO_CODECS = {"replacement", "x-user-defined"}
_NO_TEXTS = {"idna", "mbcs", "oem", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}
"""Python counts these as encodings of text, and no file is written in one."""
_REPLACED = "\ufffd"
_CONTROLS = bytes({*range(32)} - {*b"\t\n\f\r\x1b"})
_BINARY_SHARE = 0.01
_STRAY_SHARE = 0.001
"""Of all characters those that may be broken in an encoding that was named."""


def decoded(
    raw: bytes, name: str, encoding: str = "", declared: Sequence[str] = ()
) -> tuple[str, str]:
    """The text of `raw`, and what should be said about it ("" for nothing).

    What the user says is taken, else a byte order mark decides, else the first of `declared` that
    exists and fits, else it is UTF-8 or, where that does not fit, Windows-1252: a superset of
    Latin-1 in which every Western text is right, with a note, because another one may be meant.

    An encoding fits if no more characters are broken than there are whole ones beyond ASCII: other
    encodings give few valid sequences of UTF-8 by chance, and a damaged file has few broken ones.
    Broken characters become U+FFFD, and the note counts them.

    Args:
        encoding: what the user says it is.
        declared: what a server or the text itself says; labels that do not exist count for nothing.

    Raises:
        DocumentError: it is no text, or not of the encoding that the user or the mark says.
        UsageError: there is no encoding of the user's name.
    """
    if encoding:
        if not (codec := codec_of(encoding)):
            raise UsageError(f"there is no encoding {encoding}; utf-8 or shift_jis, say.")
        if codec.startswith("utf-"):
            codec = marked(raw) or codec  # utf-16 says nothing about the order of bytes
        return _certain(raw, name, codec, encoding)
    if codec := marked(raw):
        return _certain(raw, name, codec, codec)
    codecs_said = [codec for label in declared if (codec := codec_of(_first(label)))]
    if _is_binary(raw) and not (codecs_said and _is_wide(codecs_said[0])):
        raise DocumentError(f"{name} is not a text, and not a kind of document that can be read.")
    utf8 = _read(raw, "utf-8")
    for codec in codecs_said:
        found = _read(raw, codec)
        if utf8.foreign and not utf8.broken and (codec == _FALLBACK or found.broken):
            break  # many servers call everything iso-8859-1
        if found.fits or found.broken <= found.length * _STRAY_SHARE:
            return found.text, found.note(name)
    western = _read(raw, _FALLBACK)
    if utf8.fits or _is_cut(raw) or western.broken >= utf8.broken:
        return utf8.text, utf8.note(name)
    unknown = next((label for label in declared if label and not codec_of(_first(label))), "")
    said = f" and there is no encoding {unknown[:40]!r}, which it names" if unknown else ""
    return western.text, (
        f"{name} is not UTF-8{said}; it was read as Windows-1252; give --encoding if that is wrong."
    )


def codec_of(label: str) -> str:
    """The codec of Python that reads an encoding, "" if there is no such encoding of text.

    Labels mean what they mean to a browser (WHATWG): gb2312 is GB 18030, shift_jis is Windows-31J
    and iso-8859-1 is Windows-1252. Other names are those of Python.
    """
    try:
        known = webencodings.lookup(label)
        if known is not None and known.name not in _NO_CODECS:
            codec = str(known.codec_info.name)
            return _WIDER.get(codec, codec)
        codec = codecs.lookup(label).name
        if codec.replace("_", "-") in _NO_TEXTS:
            return ""
        b"a".decode(codec, errors="replace")
    except (LookupError, ValueError):  # a codec of Python that is none of text is a LookupError
        return ""
    return codec


def marked(raw: bytes) -> str:
    """The codec that a byte order mark stands for, "" without one."""
    return next((codec for mark, codec in _MARKS if raw.startswith(mark)), "")


@dataclass(frozen=True, slots=True)
class _Reading:
    """A text as one encoding has it.

    Attributes:
        length: in characters.
        foreign: whole characters that are evidence for the encoding: those beyond ASCII, and all
            of an encoding in which a character never is a byte.
        broken: characters that could not be decoded.
    """

    text: str
    length: int
    foreign: int
    broken: int

    @property
    def fits(self) -> bool:
        return self.broken <= self.foreign

    def note(self, name: str) -> str:
        if not self.broken:
            return ""
        count = "1 character" if self.broken == 1 else f"{self.broken:,} characters"
        return f"{count} of {name} could not be decoded and became {_REPLACED}."


def _read(raw: bytes, codec: str) -> _Reading:
    try:
        text = raw.decode(codec)
        broken = 0
    except (UnicodeError, ValueError):
        text = raw.decode(codec, errors="replace")
        own = raw.count(_REPLACED.encode()) if codec.startswith("utf-8") else 0
        broken = max(1, text.count(_REPLACED) - own)
    beyond = len(text) if _is_wide(codec) else len(text) - len(text.encode("ascii", "ignore"))
    return _Reading(_clean(text), len(text), beyond - broken, broken)


def _certain(raw: bytes, name: str, codec: str, label: str) -> tuple[str, str]:
    found = _read(raw, codec)
    if not found.fits and found.broken > found.length * _STRAY_SHARE:
        raise DocumentError(f"{name} is not {label}; give its --encoding.")
    return found.text, found.note(name)


def _is_wide(codec: str) -> bool:
    return codec.startswith(("utf-16", "utf-32"))


def _first(label: str) -> str:
    """`utf-8` of the label `utf-8,text/html`."""
    return re.split("[,; ]", label.strip(), maxsplit=1)[0]


def _is_cut(raw: bytes) -> bool:
    """Whether it would be UTF-8 if a last character of several bytes had not been cut."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end == len(raw) and len(raw) - error.start > 1
    return False


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
