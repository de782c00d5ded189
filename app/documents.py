"""Reading a document that goes into the context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 50 * 10**6


class DocumentError(Exception):
    """A document cannot be read; one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """A readable text."""

    name: str
    text: str


def read_document(name: str | Path) -> Document:
    """The text of a file.

    Raises:
        DocumentError: there is no such file, or it is not text.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            raise DocumentError(f"{path} is a folder; name a text file.")
        if path.stat().st_size > MAX_BYTES:
            raise DocumentError(f"{path} is larger than {MAX_BYTES // 10**6} MB.")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"There is no file {path}.") from None
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}.") from error
    text = _decoded(path, raw).replace("\r\n", "\n").strip()
    if not text:
        raise DocumentError(f"{path} is empty.")
    return Document(path.name, text)


def _decoded(path: Path, raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in raw[:8192] or raw.startswith(b"%PDF"):
        raise DocumentError(f"{path} is not a text file; convert it to text first.")
    else:
        encoding = "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
