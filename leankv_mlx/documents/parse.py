"""What bytes are, and their text. A document's content says what it is: its name and media type
decide only where the content does not.

Runs in a process of its own (`child`), because a few bytes can keep a parser busy for hours or make
it take all memory. The libraries are imported by the kinds that need them.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from leankv_mlx.errors import DocumentError

_HTML_NAMES = (".html", ".htm", ".xhtml")
_HTML_TYPES = ("text/html", "application/xhtml+xml")


def parsed(
    raw: bytes, name: str, media_type: str = "", encoding: str = "", charset: str = ""
) -> tuple[str, str]:
    """The text of a document, and what should be said about it ("" for nothing).

    Args:
        name: what to call it; its ending counts where the content says nothing.
        media_type: as a server calls it, "" if it does not say.
        encoding: of a text or page, as the user says; found out if it is not given.
        charset: the same, as a server says.

    Raises:
        DocumentError: it is of no known kind, damaged, or encrypted.
        UsageError: there is no such encoding.
    """
    try:
        return _text(raw, name, media_type, encoding, charset)
    except RecursionError as error:
        raise DocumentError(
            f"{name} is nested too deeply to be read; save it as plain text."
        ) from error


def _text(raw: bytes, name: str, media_type: str, encoding: str, charset: str) -> tuple[str, str]:
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
    from leankv_mlx.documents.html import is_html, page_text

    if is_html(raw) or suffix in _HTML_NAMES or media_type in _HTML_TYPES:
        return page_text(raw, name, encoding, charset)
    from leankv_mlx.documents.text import decoded, tidied

    text, note = decoded(raw, name, encoding, (charset,))
    return tidied(text), note
