"""What a server sends is there whole, in time and within bounds, or it is an error of one line."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from leankv_mlx.documents import readers, urls
from leankv_mlx.documents.readers import check_source, read_document
from leankv_mlx.errors import DocumentError

TEXT = "The boats were late that morning. " * 30
OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"

Answer = Callable[[socket.socket, str], None]


class Server:
    """Answers each connection with what a test says, byte by byte."""

    def __init__(self) -> None:
        self.answer: Answer = lambda peer, path: None
        self.paths: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._reply, args=(peer,), daemon=True).start()

    def _reply(self, peer: socket.socket) -> None:
        with peer, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += peer.recv(65536)
            self.paths.append(request.split(b" ")[1].decode())
            self.answer(peer, self.paths[-1])

    def sends(self, *parts: bytes) -> None:
        self.answer = lambda peer, path: peer.sendall(b"".join(parts))

    def trickles(self, before: bytes, part: bytes) -> None:
        def answer(peer: socket.socket, path: str) -> None:
            peer.sendall(before)
            while True:
                peer.sendall(part)
                time.sleep(0.02)

        self.answer = answer

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize(
    "parts",
    [
        (b"Content-Length: 1000\r\n\r\n", b"only this..."),
        (b"Transfer-Encoding: chunked\r\n\r\n", chunked(TEXT.encode())),
        (b"Transfer-Encoding: chunked\r\n\r\n", chunked(TEXT.encode())[:-9]),
        (b"Content-Encoding: gzip\r\n\r\n", gzip.compress(TEXT.encode(), mtime=0)[:-9]),
        (b"Content-Encoding: gzip\r\n\r\n", b"\x1f"),
        (b"Content-Encoding: deflate\r\n\r\n", zlib.compress(TEXT.encode())[:20]),
        (
            b"Content-Encoding: gzip\r\nContent-Length: 900\r\n\r\n",
            gzip.compress(TEXT.encode(), mtime=0),
        ),
    ],
)
def test_a_download_that_was_cut_is_no_document(parts: tuple[bytes, ...], server: Server) -> None:
    """Kind: what came before a connection ended is taken for all of it."""
    server.sends(OK, *parts)
    with pytest.raises(DocumentError, match=r"not sent whole|or not all of it") as caught:
        read_document(f"{server.url}/a.txt")
    assert str(caught.value).count(server.url) == 1  # an error is not wrapped in another


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("gzip", gzip.compress(TEXT.encode(), mtime=0)),
        ("x-gzip", gzip.compress(TEXT.encode(), mtime=0) + b"\0\0 trailing"),
        (
            "GZIP",
            gzip.compress(TEXT[:40].encode(), mtime=0) + gzip.compress(TEXT[40:].encode(), mtime=0),
        ),
        ("deflate", zlib.compress(TEXT.encode())),
        ("deflate", zlib.compress(TEXT.encode(), wbits=-15)),
        ("identity", TEXT.encode()),
    ],
)
def test_packed_content(name: str, packed: bytes, server: Server) -> None:
    """Kind: Content-Encoding is not looked at."""
    server.sends(OK, b"Content-Encoding: %s\r\n\r\n" % name.encode(), packed)
    assert read_document(f"{server.url}/a.txt").text == TEXT.strip()


def test_packed_content_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_BYTES", 10**6)
    bomb = gzip.compress(b"\0" * 10**8)
    for packed in (bomb, gzip.compress(bomb)):
        server.sends(OK, b"Content-Encoding: gzip\r\n\r\n", packed)
        with pytest.raises(DocumentError, match=r"is larger than 1 MB|is not a text"):
            read_document(f"{server.url}/a.txt")
    for name, text in (("br", "comes packed as 'br'"), ("gzip, gzip", "comes packed as 'gzip, gz")):
        server.sends(OK, b"Content-Encoding: %s\r\n\r\n" % name.encode(), bomb)
        with pytest.raises(DocumentError, match=text):
            read_document(f"{server.url}/a.txt")
    server.sends(OK, b"Content-Encoding: gzip\r\n\r\n", b"no gzip at all")
    with pytest.raises(DocumentError, match="what it sent cannot be unpacked"):
        read_document(f"{server.url}/a.txt")


@pytest.mark.parametrize(
    ("before", "part"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (OK + b"\r\n", b"x"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", chunked(b"x")),
    ],
)
def test_the_time_limit_covers_everything(
    before: bytes, part: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: a deadline that is looked at only between two pieces of the content."""
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.5)
    server.trickles(before, part)
    start = time.monotonic()
    with pytest.raises(DocumentError, match=r"took more than 0 seconds|no proper answer") as caught:
        read_document(f"{server.url}/a.txt")
    assert time.monotonic() - start < 5
    assert str(caught.value).count(server.url) == 1


def test_addresses_that_are_not_ascii(server: Server) -> None:
    """Kind: what a browser's address line takes is an error of an encoding here."""
    server.sends(OK, b"\r\n", TEXT.encode())
    assert read_document(f"{server.url}/straße/灯台 1.txt?q=ü&r=a%20b").text == TEXT.strip()
    assert server.paths[-1] == "/stra%C3%9Fe/%E7%81%AF%E5%8F%B0%201.txt?q=%C3%BC&r=a%20b"
    with pytest.raises(DocumentError, match="cannot be reached"):
        read_document("http://bücher.invalid/x")


def test_redirects(server: Server) -> None:
    def answer(peer: socket.socket, path: str) -> None:
        to = {"/1": "/größe", "/loop": "/loop", "/file": "file:///etc/hostname",
              "/ftp": "ftp://127.0.0.1/x", "/data": "data:text/plain,x"}.get(path, "")  # fmt: skip
        if to:
            head = f"HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: {to}\r\n\r\n"
            peer.sendall(head.encode())
        else:
            peer.sendall(OK + b"\r\n" + TEXT.encode())

    server.answer = answer
    assert read_document(f"{server.url}/1").text == TEXT.strip()
    for path in ("loop", "file", "ftp", "data"):
        with pytest.raises(DocumentError, match=r"cannot be reached|no proper answer") as caught:
            read_document(f"{server.url}/{path}")
        assert "\n" not in str(caught.value)


def test_a_status_is_said_in_the_words_of_the_standard(server: Server) -> None:
    server.sends(b"HTTP/1.1 404 \x1b]52;c;aGk=\x07\r\n\r\n")
    with pytest.raises(DocumentError, match=r"is not given: 404 Not Found\.$|no proper answer"):
        read_document(f"{server.url}/a")
    server.sends(b"HTTP/1.1 499 <b>Evil</b>\r\n\r\n")
    with pytest.raises(DocumentError, match=r"is not given: 499\.$"):
        read_document(f"{server.url}/a")


def test_a_charset_that_a_server_makes_up(server: Server) -> None:
    for said in ("None", "utf8mb4", "utf-8,text/html", "zlib", "punycode", '"'):
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset={said}\r\n\r\n"
        server.sends(head.encode(), "naïve".encode())
        assert read_document(f"{server.url}/a").text == "naïve"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("ftp://example.org/a.txt", "ftp: is not read from; give an http or https address"),
        ("s3://bucket/a.txt", "s3: is not read from"),
        ("SFTP://example.org/a", "SFTP: is not read from"),
        ("data:text/plain,x", "data: is not read from"),
        ("http:/example.org/a", "it begins with http://"),
        ("missing: a.txt", "there is no file missing: a.txt"),
    ],
)
def test_other_schemes_are_named(source: str, text: str) -> None:
    """Kind: an address that is not read is taken for a path."""
    for read in (read_document, check_source):
        with pytest.raises(DocumentError, match=text):
            read(source)


def test_a_file_with_a_colon_in_its_name_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:x").write_text(TEXT)
    assert read_document("data:x").text == TEXT.strip()
