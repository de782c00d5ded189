"""Documents in every format, made of the fewest bytes that make one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

FACT = "The access code of the Delta depot is 48213."
QUESTION = "What is the access code of the Delta depot?"
PARAGRAPHS = (
    "The keeper of the lighthouse walked down to the harbour before sunrise. "
    "She carried a small lamp and a letter from the mayor.",
    f"The boats were late that morning. {FACT} Nobody on the quay had slept.",
    "In the afternoon the wind turned, and the nets came in heavy with silver fish.",
)
TITLE = "Harbour report"


def prose(sentences: int, start: int = 1) -> str:
    """A paragraph of so many sentences, all different."""
    days = range(start, start + sentences)
    return " ".join(f"On day {day} the committee met at the harbour at noon." for day in days)


def text_file(path: Path, paragraphs: Sequence[str] = PARAGRAPHS) -> Path:
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def html_page(path: Path, paragraphs: Sequence[str] = PARAGRAPHS) -> Path:
    body = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    path.write_text(
        f"<!doctype html><html><head><title>{TITLE}</title><style>p {{color: red}}</style>"
        f"<script>var hidden = 1;</script></head><body><nav>Menu</nav>{body}</body></html>",
        encoding="utf-8",
    )
    return path


def pdf(path: Path, pages: Sequence[str], width: int = 80, images: Sequence[int] = ()) -> Path:
    """A page for each text, in lines of `width` characters; pages in `images` get a picture."""
    wrapped = [_wrapped(text, width) for text in pages]
    return pdf_of_lines(path, wrapped, images)


def pdf_of_lines(
    path: Path, pages: Sequence[Sequence[str]], images: Sequence[int] = (), font: str = "Courier"
) -> Path:
    """A page for each list of lines, which stand as they are given."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"",
               b"<</Type/Font/Subtype/Type1/BaseFont/%s/Encoding/WinAnsiEncoding>>" % font.encode(),
               b"<</Type/XObject/Subtype/Image/Width 1/Height 1/ColorSpace/DeviceGray"
               b"/BitsPerComponent 8/Length 1>>stream\n\x80\nendstream"]  # fmt: skip
    kids = []
    for number, page in enumerate(pages):
        lines = "".join(f"({_pdf_text(line)}) Tj T* " for line in page)
        content = f"BT /F 8 Tf 10 TL 40 780 Td {lines}ET"
        if number in images:
            content += " q 500 0 0 500 40 40 cm /I Do Q"
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F 3 0 R>>"
            b"/XObject<</I 4 0 R>>>>/Contents %d 0 R>>" % (len(objects) + 2)
        )
        stream = content.encode("cp1252")
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    objects[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(pages)}>>".encode()
    path.write_bytes(_assembled(objects, b""))
    return path


def encrypted_pdf(path: Path) -> Path:
    """Its password is not the empty one."""
    encrypt = b"<</Filter/Standard/V 1/R 2/Length 40/P -4/O<%s>/U<%s>>>" % (b"11" * 32, b"22" * 32)
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>", encrypt]
    path.write_bytes(_assembled(objects, b"/Encrypt 3 0 R/ID[<00><00>]"))
    return path


def _assembled(objects: Sequence[bytes], trailer: bytes) -> bytes:
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n")
    places = []
    for number, content in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    table = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer<</Size %d/Root 1 0 R%s>>\n" % (len(objects) + 1, trailer))
    out.write(b"startxref\n%d\n%%%%EOF\n" % table)
    return out.getvalue()


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _pdf_text(line: str) -> str:
    return line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def docx(path: Path, paragraphs: Sequence[str] = PARAGRAPHS) -> Path:
    body = "".join(f"<w:p><w:r><w:t>{escape(text)}</w:t></w:r></w:p>" for text in paragraphs)
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    _zipped(
        path,
        {
            "[Content_Types].xml": _content_types({"/word/document.xml": kind}),
            "_rels/.rels": _relations({"rId1": (f"{office}/officeDocument", "word/document.xml")}),
            "word/document.xml": f'<w:document xmlns:w="{word}">'
            f"<w:body>{body}</w:body></w:document>",
        },
    )
    return path


def epub(path: Path, paragraphs: Sequence[str] = PARAGRAPHS) -> Path:
    body = "".join(f"<p>{escape(text)}</p>" for text in paragraphs)
    container = "urn:oasis:names:tc:opendocument:xmlns:container"
    _zipped(
        path,
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": f'<container version="1.0" xmlns="{container}"><rootfiles>'
            '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/>'
            "</rootfiles></container>",
            "book.opf": '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata '
            f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{TITLE}</dc:title></metadata>'
            '<manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
            '<spine><itemref idref="a"/></spine></package>',
            "a.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><body>{body}</body></html>',
        },
    )
    return path


def _content_types(overrides: dict[str, str]) -> str:
    rows = "".join(f'<Override PartName="{p}" ContentType="{t}"/>' for p, t in overrides.items())
    return (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Default Extension="xml" ContentType="application/xml"/>{rows}</Types>'
    )


def _relations(rows: dict[str, tuple[str, str]]) -> str:
    inner = "".join(
        f'<Relationship Id="{name}" Type="{kind}" Target="{target}"/>'
        for name, (kind, target) in rows.items()
    )
    space = "http://schemas.openxmlformats.org/package/2006/relationships"
    return f'<Relationships xmlns="{space}">{inner}</Relationships>'


def _zipped(path: Path, content: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in content.items():
            archive.writestr(name, text)
