"""Documents that are made to hurt a parser, by a seed: small real ones with bytes changed, and ones
made by a grammar of what parsers are known to choke on."""

from __future__ import annotations

import io
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.documents import files

KINDS = ("html", "pdf", "docx", "xlsx", "epub", "text")
SECRET = "the-secret-of-another-file"
_XML = (
    b"<", b">", b"&", b"<a>", b"</", b'="', b"<!DOCTYPE a [", b"<!ENTITY x 'x'>", b"&x;", b"-1",
    b"\0", b"<![CDATA[", b"99999999999", b"<?xml version='1.0' encoding='utf-7'?>",
    b"<w:tbl>", b"<row>",
)  # fmt: skip
_TOKENS: dict[str, tuple[bytes, ...]] = {
    "html": (
        b"<", b">", b"<!--", b"-->", b"<?", b"<![CDATA[", b"<a b='", b"<table>", b"<td>", b"&#x",
        b"\0", b"<svg>", b"<title>", b"<pre>", b"</p>", b"<nav>", b"<meta charset=zlib>",
    ),
    "pdf": (
        b"<<", b">>", b"[", b"]", b"(", b")", b"1 0 R", b"2 0 R", b"99999999999", b"-1", b"stream",
        b"endobj", b"/Kids", b"/Count", b"/Length", b"/Filter/FlateDecode", b"/Filter/LZWDecode",
    ),
    "text": (
        b"\xff\xfe", b"\xef\xbb\xbf", b"\0\0\xfe\xff", b"%PDF-", b"PK\3\4", b"\x1b[2J", b"\r",
        b"\xed\xa0\x80", b"\xf0\x9f", b"\x85", b"\xe2\x80\xa8",
    ),
    "docx": _XML,
    "xlsx": _XML,
    "epub": _XML,
}  # fmt: skip


def inputs(kind: str, folder: Path, count: int, seed: int) -> Iterator[bytes]:
    """So many documents of a kind: one of the grammar's to every four changed ones."""
    rng = random.Random(f"{kind} {seed}")
    whole = small(kind, folder)
    for index in range(count):
        if index % 5:
            yield changed(kind, whole, rng)
        else:
            yield rng.choice(GRAMMAR[kind])(rng)


def small(kind: str, folder: Path) -> bytes:
    """The smallest real document of a kind."""
    if kind == "xlsx":
        return workbook('<row r="1"><c r="A1" t="s"><v>0</v></c><c r="B1"><v>48213</v></c></row>')
    path = folder / f"small.{kind}"
    makers: dict[str, Callable[[Path], Path]] = {
        "html": files.html_page,
        "pdf": lambda path: files.pdf(path, files.PARAGRAPHS),
        "docx": files.docx,
        "epub": files.epub,
        "text": files.text_file,
    }
    return makers[kind](path).read_bytes()


def changed(kind: str, whole: bytes, rng: random.Random) -> bytes:
    """A document with some of its bytes changed; of an archive, mostly within one member."""
    if not whole.startswith(b"PK") or rng.random() < 0.25:
        return _mutated(whole, kind, rng)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    members[name] = _mutated(members[name], kind, rng)
    return archived(members)


def _mutated(raw: bytes, kind: str, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 4, 32, 256)))
        match rng.randrange(6):
            case 0:
                data[at:end] = rng.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = rng.choice(_TOKENS[kind])
            case 3:
                data[at:at] = data[at:end] * rng.choice((2, 50, 1000))
            case 4:
                data[at:end] = rng.choice(_TOKENS[kind]) * rng.choice((1, 3, 500))
            case 5 if rng.random() < 0.3:
                del data[at:]
        del data[200_000:]
    return bytes(data)


# Pages


_OPENERS = (
    "<a ", "<!--", "<?", "<a b='", '<a b="', "<![CDATA[", "</", "&#", "<", "<p x=", "<!",
    "<script>", "<title>", "<textarea>", "<!DOCTYPE ", "</a ",
)  # fmt: skip
_TAGS = (
    "<p>", "</p>", "<table>", "<tr>", "<td>", "</table>", "<b>", "<i>", "</b>", "</i>", "<a>",
    "<pre>", "</head>", "<body>", "<li>", "<ul>", "x ", "<br>", "&amp;", "<title>",
)  # fmt: skip


def _openers(rng: random.Random) -> bytes:
    return f"<html>{rng.choice(_OPENERS) * rng.choice((1000, 20_000))}".encode()


def _nested_tags(rng: random.Random) -> bytes:
    tag = rng.choice(("div", "b", "table", "ul><li", "span", "svg", "font", "nav", "blockquote"))
    closed = f"</{tag}>" * rng.choice((0, 20_000))
    return f"<html>{f'<{tag}>' * rng.choice((500, 20_000))}x{closed}".encode()


def _soup(rng: random.Random) -> bytes:
    return f"<html>{''.join(rng.choices(_TAGS, k=rng.choice((50, 5000))))}".encode()


# Texts


def _encodings(rng: random.Random) -> bytes:
    text = "naïve 灯台 𝄞 €\n" * rng.choice((1, 500))
    codec = rng.choice(("utf-8", "utf-16", "utf-32", "gb18030", "utf-7", "utf-16-be", "utf-8-sig"))
    raw = bytearray(text.encode(codec))
    for _ in range(rng.choice((0, 1, 20))):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(1, len(raw) + 1)])


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 100, 50_000)))


def _long(rng: random.Random) -> bytes:
    return rng.choice(
        (b"x", b" ", b"\n", b"\r", b" \n", b"\xc3\xa9", b"\t", b"\xe2\x80\xa8")
    ) * rng.choice((10_000, 2_000_000))


# PDF


def _pdf(objects: list[bytes], trailer: bytes = b"") -> bytes:
    return files._assembled(objects, trailer)


def _stream(content: bytes, head: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (head, len(content), content)


def _page(content: bytes, resources: bytes, *further: bytes) -> bytes:
    """A page whose content is object 4; what follows is numbered from 5."""
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<<%s>>/Contents 4 0 R>>"
    catalog, pages = b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>"
    return _pdf([catalog, pages, page % resources, _stream(content), *further])


def nested_forms(depth: int, times: int) -> bytes:
    """Each form draws the next one so many times: times ** depth drawings of a line of text."""
    forms = []
    for level in range(depth):
        resources = b"/Resources<</XObject<</F %d 0 R>>>>" % (6 + level)
        content = b"/F Do " * times
        if level == depth - 1:
            resources = b"/Resources<</Font<</T<</Type/Font/Subtype/Type1/BaseFont/Courier>>>>>>"
            content = b"BT /T 8 Tf 40 40 Td (again) Tj ET"
        head = b"/Type/XObject/Subtype/Form/BBox[0 0 612 792]" + resources
        forms.append(_stream(content, head))
    return _page(b"/F Do", b"/XObject<</F 5 0 R>>", *forms)


def _forms(rng: random.Random) -> bytes:
    return nested_forms(rng.choice((3, 12, 200)), rng.choice((1, 2)))


def _cycles(rng: random.Random) -> bytes:
    kids = rng.choice((b"2 0 R", b"1 0 R", b"3 0 R 2 0 R", b"99 0 R", b"3 0 R " * 5000))
    count = rng.choice((b"1", b"-1", b"2147483647", b"2 0 R", b"99999999999999"))
    parent = rng.choice((b"2 0 R", b"3 0 R", b"1 0 R"))
    length = rng.choice((b"4 0 R", b"99999999", b"-5"))
    return _pdf([
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %s/Parent %s>>" % (kids, count, parent),
        b"<</Type/Page/Parent %s/MediaBox[0 0 9e99 -1]/Contents[4 0 R 4 0 R 3 0 R]>>" % parent,
        b"<</Length %s>>stream\nBT (x) Tj ET\nendstream" % length,
    ], rng.choice((b"", b"/Prev 9", b"/Prev 400/XRefStm 400")))  # fmt: skip


def _pdf_nesting(rng: random.Random) -> bytes:
    opener = rng.choice((b"[", b"<<", b"(", b"<</A ", b"[ 1 0 R ", b"q ", b"BT ", b"/X BMC "))
    many = opener * rng.choice((400, 50_000))
    return rng.choice((_page(many, b""), _page(b"", b"/Font " + many), _pdf([many])))


def _flate(rng: random.Random) -> bytes:
    packed = zlib.compress(b"BT (x) Tj ET " * rng.choice((1000, 500_000)))
    once = rng.choice((b"/FlateDecode", b"[/FlateDecode]", b"[%s]" % (b"/FlateDecode" * 50)))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
               b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>",
               _stream(packed, b"/Filter" + once)]  # fmt: skip
    return _pdf(objects)


# Archives of XML


def archived(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def lying(raw: bytes, size: int) -> bytes:
    """An archive whose members all say that they unpack to `size` bytes."""
    data, at = bytearray(raw), 0
    for mark, field in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = 0
        while (at := data.find(mark, at)) >= 0:
            struct.pack_into("<I", data, at + field, size)
            at += 4
    return bytes(data)


def workbook(rows: str, strings: str = "<si><t>depot</t></si>") -> bytes:
    """A workbook of one sheet."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml."
    parts = {
        "[Content_Types].xml": files._content_types({
            "/xl/workbook.xml": f"{kind}sheet.main+xml",
            "/xl/worksheets/sheet1.xml": f"{kind}worksheet+xml",
            "/xl/sharedStrings.xml": f"{kind}sharedStrings+xml",
        }),
        "_rels/.rels": files._relations({"rId1": (f"{office}/officeDocument", "xl/workbook.xml")}),
        "xl/_rels/workbook.xml.rels": files._relations({
            "rId1": (f"{office}/worksheet", "worksheets/sheet1.xml"),
            "rId2": (f"{office}/sharedStrings", "sharedStrings.xml"),
        }),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="Sheet" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{rows}</sheetData>'
        "</worksheet>",
        "xl/sharedStrings.xml": f'<sst xmlns="{main}">{strings}</sst>',
    }  # fmt: skip
    return archived({name: text.encode() for name, text in parts.items()})


def giant_sheet() -> bytes:
    """Two cells, in opposite corners of the largest sheet that there can be."""
    return workbook(
        '<row r="1"><c r="A1"><v>1</v></c></row>'
        '<row r="1048576"><c r="XFD1048576"><v>2</v></c></row>'
    )


def _cells(rng: random.Random) -> bytes:
    rows = []
    for _ in range(rng.choice((1, 3, 300))):
        row = rng.choice((1, 2, 1048576, 2**31, 99999999, -1, 0))
        column = rng.choice(("A", "XFD", "ZZZZZZ", "", "1", "Ω"))
        shape = rng.choice(("", ' t="s"', ' t="b"', ' t="d"', ' t="e"', ' t="x"', ' s="99"'))
        value = rng.choice(("1", "99999", "-1", "1e999", "nan", "", "x" * 1000, "2026-13-45"))
        rows.append(f'<row r="{row}"><c r="{column}{row}"{shape}><v>{value}</v></c></row>')
    return workbook("".join(rows))


def _entities(kind: str) -> Callable[[random.Random], bytes]:
    """Entities that grow, and ones that name other files; they stand where the text is."""

    def made(rng: random.Random) -> bytes:
        levels = range(1, rng.choice((5, 40)))
        bomb = "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in levels)
        head = rng.choice((
            f"<!DOCTYPE x [<!ENTITY a0 'ha'>{bomb}]>",
            "<!DOCTYPE x [<!ENTITY a4 SYSTEM 'secret.txt'>]>",
            "<!DOCTYPE x SYSTEM 'secret.txt'>",
            f"<!DOCTYPE x [<!ENTITY a4 '{'x' * 100_000}'>]>",
        ))  # fmt: skip
        members, member = _members(kind), _TEXT_OF[kind]
        text = members[member].decode()
        at = text.index("</")
        members[member] = f"{head}{text[:at]}{'&a4;' * rng.choice((1, 300))}{text[at:]}".encode()
        return archived(members)

    return made


def _nested_in(kind: str, tag: str) -> Callable[[random.Random], bytes]:
    def made(rng: random.Random) -> bytes:
        members, member = _members(kind), _TEXT_OF[kind]
        text = members[member].decode()
        at, depth = text.rindex("</", 0, text.rindex("</")), rng.choice((300, 3000, 3000, 30_000))
        many = f"<{tag}>" * depth + f"</{tag}>" * rng.choice((0, depth))
        members[member] = f"{text[:at]}{many}{text[at:]}".encode()
        return archived(members)

    return made


def _lying_of(kind: str) -> Callable[[random.Random], bytes]:
    def made(rng: random.Random) -> bytes:
        members, member = _members(kind), _TEXT_OF[kind]
        filling = rng.choice((b" ", b"<a/>", b"x")) * rng.choice((10_000, 2_000_000))
        members[member] += filling
        return lying(archived(members), rng.choice((0, 10, 1000, 2**31 - 1, 2**32 - 1)))

    return made


def _bomb_of(kind: str) -> Callable[[random.Random], bytes]:
    def made(rng: random.Random) -> bytes:
        members, member = _members(kind), _TEXT_OF[kind]
        at = members[member].rindex(b"</")
        filling = rng.choice((b" ", b"<a/>", b"<a b='c'>x</a>", b"x")) * rng.choice(
            (1000, 20_000, 20_000, 300_000)
        )
        members[member] = members[member][:at] + filling + members[member][at:]
        return archived(members)

    return made


def _repeated_spine(rng: random.Random) -> bytes:
    members = _members("epub")
    many = b'<itemref idref="a"/>' * rng.choice((100, 100_000))
    members["book.opf"] = members["book.opf"].replace(b'<itemref idref="a"/>', many)
    return archived(members)


def _members(kind: str) -> dict[str, bytes]:
    """What the small document of a kind is made of."""
    with tempfile.TemporaryDirectory() as folder:
        raw = small(kind, Path(folder))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


_TEXT_OF = {
    "docx": "word/document.xml",
    "xlsx": "xl/worksheets/sheet1.xml",
    "epub": "a.xhtml",
}


def _of_archive(kind: str, tags: tuple[str, ...]) -> list[Callable[[random.Random], bytes]]:
    nested = [_nested_in(kind, tag) for tag in tags]
    return [*nested, _entities(kind), _lying_of(kind), _bomb_of(kind)]


GRAMMAR: dict[str, list[Callable[[random.Random], bytes]]] = {
    "html": [_openers, _nested_tags, _soup],
    "text": [_encodings, _noise, _long],
    "pdf": [_forms, _cycles, _pdf_nesting, _flate],
    "docx": _of_archive("docx", ("w:tbl", "w:p", "a", "w:sdt")),
    "xlsx": [_cells, _cells, *_of_archive("xlsx", ("row", "c"))],
    "epub": [_repeated_spine, *_of_archive("epub", ("div", "table", "b"))],
}
