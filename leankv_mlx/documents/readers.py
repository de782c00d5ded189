"""From a path, an address or stdin to text, whatever kind of document it is.

The bytes are got here; `isolated` has them parsed in another process.
"""

from __future__ import annotations

import hashlib
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from leankv_mlx.documents.isolated import Look, isolated_text, no_look
from leankv_mlx.documents.urls import SCHEMES, fetch
from leankv_mlx.errors import DocumentError, UsageError
from leankv_mlx.folders import expanded

MAX_BYTES = 100 * 10**6
STDIN = "-"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+(?=:/)|data|mailto):", re.IGNORECASE)
_HALVES = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes of a file name that are not UTF-8, and no text can be written with."""


@dataclass(frozen=True, slots=True)
class Document:
    """A readable text.

    Attributes:
        name: what to call it.
        text: with `\\n` line ends.
        notes: what was noticed while reading; one line each.
    """

    name: str
    text: str
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What tells its text from any other."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()


def document_head(text: str) -> str:
    """What a message about a document begins with; the question follows."""
    return f"Document:\n{text}\n\n"


def read_document(source: str | Path, encoding: str = "", look: Look = no_look) -> Document:
    """Read a document.

    Args:
        source: a path, an http or https address, or "-" for stdin.
        encoding: of a text or page; found out if it is not given.
        look: called some times a second while it is parsed; may raise to stop.

    Raises:
        DocumentError: it does not exist, is too large, cannot be read, or has no text.
        UsageError: there is no such encoding.
    """
    media_type = charset = ""
    if source == STDIN:
        name, raw = "stdin", _from_stdin()
    elif _is_address(source):
        fetched = fetch(str(source), MAX_BYTES)
        name, raw, media_type = fetched.name, fetched.data, fetched.media_type
        charset = fetched.charset
    else:
        path = expanded(source)
        name, raw = shown(path.name), _from_file(path)
    text, note = isolated_text(raw, name, media_type, encoding, charset, look)
    text = text.strip()
    if not text:
        raise DocumentError(f"{name} is empty.")
    return Document(name, text, (note,) if note else ())


def check_source(source: str | Path) -> None:
    """Find what is wrong with a path without reading the file.

    Raises:
        DocumentError: there is no such file, or it is too large.
        UsageError: it is stdin, where a whole program needs it.
    """
    if source == STDIN:
        raise UsageError("- does not work here; name a file.")
    if not _is_address(source):
        _checked(expanded(source))


def _is_address(source: str | Path) -> bool:
    return isinstance(source, str) and source.lower().startswith(SCHEMES)


def shown(text: str | Path) -> str:
    """A name that can be written anywhere: names of files need not be UTF-8."""
    return _HALVES.sub("\ufffd", str(text))


def _checked(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise DocumentError(f"{shown(path)} is a folder; name a file.")
    if not stat.S_ISREG(status.st_mode):
        raise DocumentError(f"{shown(path)} is no file; give - and pipe it in.")
    if status.st_size > MAX_BYTES:
        raise DocumentError(
            f"{shown(path)} has {status.st_size / 1e6:,.0f} MB and the limit is "
            f"{MAX_BYTES // 10**6} MB; give a part of it."
        )


def _missing(path: Path) -> DocumentError:
    name = shown(path)
    if not (scheme := _SCHEME.match(name)):
        return DocumentError(f"there is no file {name}.")
    if scheme[1].lower() == "file":
        return DocumentError(f"{name} is no path; give it without file:.")
    if scheme[1].lower() in ("http", "https"):
        return DocumentError(f"{name} is no address; it begins with {scheme[1].lower()}://.")
    return DocumentError(
        f"{scheme[1]}: is not read from; give an http or https address, or fetch the file first."
    )


def _from_file(path: Path) -> bytes:
    _checked(path)
    try:
        with path.open("rb") as file:
            return _limited(file.read(MAX_BYTES + 1), shown(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DocumentError:
    reason = getattr(error, "strerror", None) or error
    return DocumentError(f"{shown(path)} cannot be read: {reason}.")


def _from_stdin() -> bytes:
    if sys.stdin is None:
        raise DocumentError("stdin is closed; name a file.")
    try:
        return _limited(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin")
    except (OSError, ValueError) as error:  # ValueError: it was closed
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"stdin cannot be read: {reason}.") from error


def _limited(raw: bytes, name: str) -> bytes:
    if len(raw) > MAX_BYTES:
        raise DocumentError(f"{name} has more than {MAX_BYTES // 10**6} MB; give a part of it.")
    return raw
