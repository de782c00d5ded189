"""Every kind of document gives its text, and what cannot be read says why in one line."""

from __future__ import annotations

import http.server
import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leankv_mlx.documents import office, readers, urls
from leankv_mlx.documents.parse import parsed
from leankv_mlx.documents.readers import check_source, read_document
from leankv_mlx.errors import DocumentError, LeanKVError, UsageError
from tests.documents.files import (
    FACT,
    PARAGRAPHS,
    TITLE,
    docx,
    encrypted_pdf,
    epub,
    html_page,
    pdf,
    text_file,
)

WHOLE = "\n\n".join(PARAGRAPHS)


def pdf_of_paragraphs(path: Path) -> Path:
    return pdf(path, PARAGRAPHS)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "txt": text_file,
    "html": html_page,
    "pdf": pdf_of_paragraphs,
    "docx": docx,
    "epub": epub,
}


def made(kind: str, folder: Path, name: str = "report") -> Path:
    if kind in office.KINDS:
        pytest.importorskip("markitdown")
    return MAKERS[kind](folder / f"{name}.{kind}")


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_gives_its_text(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path)
    found = read_document(path)
    assert found.name == path.name
    assert found.notes == ()
    text = found.text
    if kind in ("html", "epub"):
        assert TITLE in text
        text = text[text.index(PARAGRAPHS[0]) :]
    assert text == WHOLE


@pytest.mark.parametrize("kind", MAKERS)
def test_the_content_says_what_it_is_not_the_name(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path).rename(tmp_path / "noname")
    assert FACT in read_document(path).text


def test_slides_and_sheets(tmp_path: Path) -> None:
    pytest.importorskip("markitdown")
    import openpyxl
    import pptx

    slides = pptx.Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = TITLE, FACT
    slides.save(str(tmp_path / "a.pptx"))
    assert FACT in read_document(tmp_path / "a.pptx").text
    book = openpyxl.Workbook()
    book.active.append(["depot", "code"])
    book.active.append(["Delta", 48213])
    book.save(tmp_path / "a.xlsx")
    assert "| Delta | 48213 |" in read_document(tmp_path / "a.xlsx").text


# Texts


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("naïve\r\ntext\rx".encode(), "naïve\ntext\nx"),
        ("naïve".encode("utf-8-sig"), "naïve"),
        ("naïve €".encode("utf-16"), "naïve €"),
        ("naïve 𝄞".encode("utf-32"), "naïve 𝄞"),
        (b"# A\n\n\n\n\n- b   \n", "# A\n\n- b"),
        (b"C:\\new\\table", "C:\\new\\table"),
    ],
)
def test_texts_of_any_encoding(raw: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(raw)
    assert read_document(tmp_path / "a.md").text == text


def test_another_encoding_is_guessed_with_a_note_or_given(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("café “quoted”".encode("cp1252"))
    found = read_document(path)
    assert found.text == "café “quoted”"
    assert "was read as Windows-1252" in found.notes[0]
    path.write_bytes("灯台".encode("shift_jis"))
    assert read_document(path, "shift_jis").text == "灯台"
    with pytest.raises(DocumentError, match="is not utf-8"):
        read_document(path, "utf-8")
    with pytest.raises(UsageError, match="no encoding klingon"):
        read_document(path, "klingon")
    with pytest.raises(LeanKVError):
        read_document(path, "zlib_codec")  # a codec of Python that is no encoding of text


# Pages


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one<br>two  \n three</p><p>four", "one\ntwo three\n\nfour"),
        ("<h2>Head</h2><ul><li>a<li>b</ul>", "## Head\n\n- a\n- b"),
        ("<table><tr><th>x</th><td>1</td></tr><tr><td>y<td>2</table>", "x | 1\ny | 2"),
        ("<pre>a\n  b</pre>", "a\n  b"),
        ("<p>a &lt;b&gt; &amp; &eacute;&#x2014;</p>", "a <b> & é—"),
        ("<nav>no</nav><script>no</script><style>no</style><p>yes</p>", "yes"),
        ("<script>if (a < b) { document.write('<p>no</p>') }</script>yes", "yes"),
        ("<noscript><p>no</p></noscript><svg><text>no</text></svg>yes", "yes"),
        ("<p>an <b>important</b> <i>word</i></p></div></p></b>", "an important word"),
        ("<head><title>T</title><meta><body>x", "T\n\nx"),
    ],
)
def test_pages(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<html>{page}", encoding="utf-8")
    assert read_document(tmp_path / "a.html").text == text


def test_a_page_says_its_encoding(tmp_path: Path) -> None:
    page = "<html><meta charset=windows-1251><p>Привет</p>"
    (tmp_path / "a.html").write_bytes(page.encode("windows-1251"))
    assert read_document(tmp_path / "a.html").text == "Привет"
    (tmp_path / "a.html").write_text(page.replace("windows-1251", "nonsense"), encoding="utf-8")
    assert read_document(tmp_path / "a.html").text == "Привет"


# PDF


def test_wrapped_lines_are_joined_and_others_kept(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", ["word " * 40, "A (short) line"], width=60)
    assert read_document(path).text == f"{('word ' * 40).strip()}\n\nA (short) line"
    pdf(path, ["first entry other entry"], width=12)
    assert read_document(path).text == "first entry\nother entry"


def test_pictures_of_pages(tmp_path: Path) -> None:
    scanned = pdf(tmp_path / "a.pdf", ["", "", "12"], images=(0, 1, 2))
    with pytest.raises(DocumentError, match=r"is scanned: 3 of its 3 pages.*ocrmypdf"):
        read_document(scanned)
    found = read_document(pdf(tmp_path / "b.pdf", [*PARAGRAPHS, ""], images=(0, 3)))
    assert FACT in found.text
    assert found.notes == ("1 of 4 pages of b.pdf are pictures without text.",)
    with pytest.raises(DocumentError, match="2 pages and no text"):
        read_document(pdf(tmp_path / "c.pdf", ["", ""]))
    assert read_document(pdf(tmp_path / "d.pdf", ["Hi"])).text == "Hi"


def test_encrypted_and_damaged_pdfs(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="is encrypted; save a copy without a password"):
        read_document(encrypted_pdf(tmp_path / "a.pdf"))
    whole = pdf(tmp_path / "b.pdf", PARAGRAPHS).read_bytes()
    (tmp_path / "b.pdf").write_bytes(whole[:60])
    with pytest.raises(DocumentError, match="is damaged or no PDF"):
        read_document(tmp_path / "b.pdf")


# Archives


def test_archives_that_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "x")
    with pytest.raises(DocumentError, match="is an archive; unpack it"):
        read_document(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DocumentError, match="is an archive"):
        read_document(path)
    pytest.importorskip("markitdown")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<broken")
    with pytest.raises(DocumentError, match="cannot be read as docx"):
        read_document(path)


def test_a_small_archive_cannot_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(office, "MAX_UNPACKED", 10**6)
    path = tmp_path / "a.docx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", " " * (10**6 + 1))
    with pytest.raises(DocumentError, match="unpacks to more than 1 MB"):
        parsed(path.read_bytes(), path.name)  # in this process, where the limit is another


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "markitdown", None)
    with pytest.raises(DocumentError, match=r"takes the extra docs: pip install 'leankv-mlx\[docs"):
        parsed(docx(tmp_path / "a.docx").read_bytes(), "a.docx")


# Files


def test_a_file_of_2_gb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(2 * 10**9)
    start = time.perf_counter()
    for read in (read_document, check_source):
        with pytest.raises(DocumentError, match="has 2,000 MB and the limit is 100 MB"):
            read(path)
    assert time.perf_counter() - start < 1


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "spaces").write_text(" \n\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9)
    for name, text in (
        ("pipe", "is no file; give - and pipe it in"),
        ("", "is a folder"),
        ("empty", "is empty"),
        ("spaces", "is empty"),
        ("binary", "is not a text"),
        ("missing", "there is no file"),
        ("x" * 300, "cannot be read"),
        ("nul\0", "cannot be read"),
    ):
        with pytest.raises(DocumentError, match=text) as caught:
            read_document(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WHOLE.encode())))
    found = read_document("-")
    assert (found.name, found.text) == ("stdin", WHOLE)
    with pytest.raises(UsageError, match="- does not work here"):
        check_source("-")
    monkeypatch.setattr(readers, "MAX_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    with pytest.raises(DocumentError, match="stdin has more than"):
        read_document("-")


# Addresses


class Site(http.server.BaseHTTPRequestHandler):
    """What the tests fetch."""

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/page":
            self.send(f"<p>Grüße: {FACT}".encode("latin-1"), "text/html; charset=iso-8859-1")
        elif self.path == "/report.pdf":
            self.send(self.server.pdf, "application/octet-stream")  # type: ignore[attr-defined]
        elif self.path == "/large":
            self.send(b"", "text/plain", length=10**9)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                try:
                    self.wfile.write(b"x" * 65536)
                except OSError:
                    return
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/page")
            self.end_headers()
        elif self.path == "/local":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/silent":
            time.sleep(2)
        elif self.path == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
        else:
            self.send_error(404)

    def send(self, content: bytes, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.pdf = pdf(tmp_path / "a.pdf", PARAGRAPHS).read_bytes()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(site: str) -> None:
    page = read_document(f"{site}/page")
    assert (page.name, page.text) == ("page", f"Grüße: {FACT}")
    assert read_document(f"{site}/moved").text == page.text
    found = read_document(f"{site}/report.pdf")
    assert (found.name, found.text) == ("report.pdf", WHOLE)
    check_source(f"{site}/anything")


def test_addresses_that_give_nothing(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(readers, "MAX_BYTES", 10**6)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for address, text in (
        (f"{site}/missing", "is not given: 404"),
        (f"{site}/large", "is larger than 1 MB"),
        (f"{site}/endless", "is larger than 1 MB"),
        (f"{site}/silent", "cannot be reached"),
        (f"{site}/local", "302|cannot be reached|not given"),
        (f"{site}/nonsense", "no proper answer|cannot be reached"),
        (f"http://127.0.0.1:{port}/x", r"cannot be reached \(Connection refused\); check"),
        ("http://no.such.host.invalid/x", "cannot be reached .* check the address and the network"),
        ("http://", "cannot be reached|no proper answer"),
        ("https://[", "cannot be reached|no proper answer"),
    ):
        with pytest.raises(DocumentError, match=text) as caught:
            read_document(address)
        assert "\n" not in str(caught.value)


def test_a_slow_server_has_an_end(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.0)
    with pytest.raises(DocumentError, match="took more than 0 seconds"):
        read_document(f"{site}/page")


def test_reading_a_text_imports_no_model_library(tmp_path: Path) -> None:
    code = (
        "import sys; from leankv_mlx.documents.readers import read_document; "
        "read_document(sys.argv[1]); "
        "print(sorted({'mlx', 'mlx.core', 'mlx_lm', 'markitdown'} & set(sys.modules)))"
    )
    path = text_file(tmp_path / "a.txt")
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"
