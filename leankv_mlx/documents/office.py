"""Documents that are archives of XML: docx, pptx and epub through markitdown, xlsx by `sheets`."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

from leankv_mlx.documents.text import tidied
from leankv_mlx.errors import DocumentError

KINDS = ("docx", "pptx", "xlsx", "epub")
_FOLDERS = {"word/": "docx", "ppt/": "pptx", "xl/": "xlsx"}
MAX_UNPACKED = 500 * 10**6
"""Bytes that an archive may hold: a small file can unpack to any size."""


def office_kind(raw: bytes) -> str:
    """Which of `KINDS` an archive is, "" for none of them."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = archive.namelist()
            if "META-INF/container.xml" in names:
                return "epub"
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""
    return next((kind for folder, kind in _FOLDERS.items() if _has(names, folder)), "")


def _has(names: list[str], folder: str) -> bool:
    return any(name.startswith(folder) for name in names)


def office_text(raw: bytes, name: str, kind: str) -> str:
    """The text of a document as Markdown.

    Raises:
        DocumentError: the extra is not installed, or the file cannot be read.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DocumentError(f"{name} is damaged or no {kind} ({error}).") from error
    if sum(entry.file_size for entry in entries) > MAX_UNPACKED:
        raise DocumentError(f"{name} unpacks to more than {MAX_UNPACKED // 10**6} MB.")
    if any(entry.flag_bits & 1 for entry in entries):
        raise DocumentError(f"{name} is encrypted; save a copy without a password.")
    try:
        convert = _converter(kind)
    except ImportError as error:
        raise DocumentError(
            f"reading {name} takes the extra docs: pip install 'leankv-mlx[docs]'."
        ) from error
    try:
        return tidied(convert(raw))
    except MemoryError:
        raise
    except Exception as error:  # whatever its converters and their libraries raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DocumentError(f"{name} cannot be read as {kind} ({reason[0][:200]}).") from error


def _converter(kind: str) -> Callable[[bytes], str]:
    """What makes Markdown of one kind of document.

    Markitdown's own dispatcher would load a model to guess the kind, and hide that memory ran out.
    """
    if kind == "xlsx":
        from leankv_mlx.documents.sheets import workbook_text

        return workbook_text
    from markitdown import StreamInfo, converters

    classes: dict[str, Any] = {
        "docx": converters.DocxConverter,
        "pptx": converters.PptxConverter,
        "epub": converters.EpubConverter,
    }
    made = classes[kind]()

    def convert(raw: bytes) -> str:
        found = made.convert(io.BytesIO(raw), StreamInfo(extension=f".{kind}"))
        text: str = found.text_content
        return text

    return convert
