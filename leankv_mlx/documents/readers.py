"""From a path, an address or stdin to text, whatever kind of document it is.

What a document is, its content says: names and media types decide only where the content does not.
"""

from __future__ import annotations

import hashlib
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from leankv_mlx.documents.html import is_html, page_text
from leankv_mlx.documents.text import decoded, tidied
from leankv_mlx.documents.urls import SCHEMES, fetch
from leankv_mlx.errors import DocumentError, UsageError

MAX_BYTES = 100 * 10**6
STDIN = "-"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+(?=:/)|data|mailto):", re.IGNORECASE)
_HTML_NAMES = (".html", ".htm", ".xhtml")
_HTML_TYPES = ("text/html", "application/xhtml+xml")


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


def read_document(source: str | Path, encoding: str = "") -> Document:
    """Read a document.

    Args:
        source: a path, an http or https address, or "-" for stdin.
        encoding: of a text or page; found out if it is not given.

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
        path = Path(source).expanduser()
        name, raw = path.name, _from_file(path)
    text, note = _text(raw, name, media_type, encoding, charset)
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
        _checked(Path(source).expanduser())


def _is_address(source: str | Path) -> bool:
    return isinstance(source, str) and source.lower().startswith(SCHEMES)


def _checked(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise DocumentError(f"{path} is a folder; name a file.")
    if not stat.S_ISREG(status.st_mode):
        raise DocumentError(f"{path} is no file; give - and pipe it in.")
    if status.st_size > MAX_BYTES:
        raise DocumentError(
            f"{path} has {status.st_size / 1e6:,.0f} MB and the limit is "
            f"{MAX_BYTES // 10**6} MB; give a part of it."
        )


def _missing(path: Path) -> DocumentError:
    if not (scheme := _SCHEME.match(str(path))):
        return DocumentError(f"there is no file {path}.")
    if scheme[1].lower() == "file":
        return DocumentError(f"{path} is no path; give it without file:.")
    if scheme[1].lower() in ("http", "https"):
        return DocumentError(f"{path} is no address; it begins with {scheme[1].lower()}://.")
    return DocumentError(
        f"{scheme[1]}: is not read from; give an http or https address, or fetch the file first."
    )


def _from_file(path: Path) -> bytes:
    _checked(path)
    try:
        with path.open("rb") as file:
            return _limited(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DocumentError:
    reason = getattr(error, "strerror", None) or error
    return DocumentError(f"{path} cannot be read: {reason}.")


def _from_stdin() -> bytes:
    try:
        return _limited(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin")
    except OSError as error:
        raise DocumentError(f"stdin cannot be read: {error.strerror}.") from error


def _limited(raw: bytes, name: str) -> bytes:
    if len(raw) > MAX_BYTES:
        raise DocumentError(f"{name} has more than {MAX_BYTES // 10**6} MB; give a part of it.")
    return raw


def _text(raw: bytes, name: str, media_type: str, encoding: str, charset: str) -> tuple[str, str]:
    """The text, and what should be said about it."""
    if b"%PDF-" in raw[:1024]:
        from leankv_mlx.documents.pdf import is_pdf, pdf_text

        if is_pdf(raw):
            return pdf_text(raw, name)
    suffix = PurePosixPath(name).suffix.lower()
    if raw.startswith(b"PK\3\4"):
        from leankv_mlx.documents.office import office_kind, office_text

        kind = office_kind(raw)
        if not kind:
            raise DocumentError(f"{name} is an archive; unpack it and name a document.")
        return office_text(raw, name, kind), ""
    if is_html(raw) or suffix in _HTML_NAMES or media_type in _HTML_TYPES:
        return page_text(raw, name, encoding, charset)
    text, note = decoded(raw, name, encoding, (charset,))
    return tidied(text), note
