"""Fetching a document from the web, with limits on time and size."""

from __future__ import annotations

import asyncio
import http
import os
import zlib
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from leankv_mlx.errors import DocumentError

if TYPE_CHECKING:
    import httpx2

SCHEMES = ("http://", "https://")
WAIT_SECONDS = 15.0
"""How long a server may stay silent."""
TOTAL_SECONDS = 120.0
"""How long all of it may take: looking up the name, redirects, headers and content."""
_REDIRECTS = 10


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a server sent.

    Attributes:
        name: last part of the address, else the host.
        media_type: as the server calls it, such as text/html.
        charset: as the server calls it, "" if it does not say.
    """

    name: str
    data: bytes
    media_type: str
    charset: str


def fetch(url: str, max_bytes: int) -> Fetched:
    """Get a page or file. Hosts and paths need not be ASCII; a redirect leads to http and https
    only. Not to be called where an event loop runs.

    Args:
        max_bytes: of the content, unpacked.

    Raises:
        DocumentError: no network, no such page, too large, too slow, or not sent whole.
    """
    import httpx2

    try:
        return asyncio.run(_bounded(url, max_bytes))
    except TimeoutError:
        raise DocumentError(f"{url} took more than {TOTAL_SECONDS:.0f} seconds.") from None
    except httpx2.RemoteProtocolError as error:
        reason = _reason(error)[:200]
        raise DocumentError(f"{url} sent no proper answer, or not all of it ({reason}).") from error
    except httpx2.TimeoutException as error:
        raise _unreachable(url, f"no answer in {WAIT_SECONDS:g} seconds") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        raise _unreachable(url, _reason(error)) from error


async def _bounded(url: str, max_bytes: int) -> Fetched:
    async with asyncio.timeout(TOTAL_SECONDS):
        return await _fetched(url, max_bytes)


async def _fetched(url: str, max_bytes: int) -> Fetched:
    import httpx2

    from leankv_mlx import __version__

    headers = {
        "User-Agent": f"leankv-mlx/{__version__}",
        "Accept": "text/html,text/*,*/*",
        "Accept-Encoding": "gzip, deflate",
    }
    async with (
        httpx2.AsyncClient(
            headers=headers,
            timeout=WAIT_SECONDS,
            follow_redirects=True,
            max_redirects=_REDIRECTS,
            # A redirect gets a connection of its own: servers close the one before, now and then
            # just as the next request comes.
            limits=httpx2.Limits(max_keepalive_connections=0),
        ) as client,
        client.stream("GET", url) as answer,
    ):
        if not answer.is_success:
            raise DocumentError(f"{url} is not given: {_status(answer.status_code)}.")
        data = await _content(answer, url, max_bytes)
    kind = Message()
    kind["Content-Type"] = answer.headers.get("Content-Type", "text/plain")
    parts = urlsplit(url)
    name = parts.path.rstrip("/").rsplit("/", 1)[-1] or parts.netloc
    return Fetched(name, data, kind.get_content_type(), kind.get_content_charset() or "")


async def _content(answer: httpx2.Response, url: str, max_bytes: int) -> bytes:
    length = answer.headers.get("Content-Length", "")
    if length.isascii() and length.isdigit() and float(length) > max_bytes:
        raise _too_large(url, max_bytes)
    packing = answer.headers.get("Content-Encoding", "").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise DocumentError(f"{url} comes packed as {packing[:40]!r}, which is not read here.")
    unpacker = None if packing in ("", "identity") else _Unpacker()
    data = bytearray()
    async for piece in answer.aiter_raw():
        data += piece if unpacker is None else unpacker.unpacked(piece, max_bytes + 1 - len(data))
        if len(data) > max_bytes:
            raise _too_large(url, max_bytes)
    if unpacker is not None and not unpacker.is_whole:
        raise DocumentError(f"{url} was not sent whole; try again.")
    return bytes(data)


class _Unpacker:
    """Content-Encoding gzip or deflate, piece by piece, never more than is asked for."""

    def __init__(self) -> None:
        self._head = b""
        self._stream: zlib._Decompress | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the end has come; nothing at all is whole too."""
        return self._stream.eof if self._stream else not self._head

    def unpacked(self, piece: bytes, room: int) -> bytes:
        """At most `room` bytes; where there are more, the rest is lost.

        Raises:
            ValueError: it is not packed so.
        """
        try:
            return self._unpacked(self._head + piece, room)
        except zlib.error as error:
            raise ValueError("what it sent cannot be unpacked") from error

    def _unpacked(self, packed: bytes, room: int) -> bytes:
        if self._stream is None and len(packed) < 2:
            self._head = packed
            return b""
        self._head = b""
        data = b""
        while packed and len(data) < room:
            if self._stream is None or (self._stream.eof and packed.startswith(b"\x1f\x8b")):
                self._stream = zlib.decompressobj(_window(packed))
            if self._stream.eof:
                break  # behind the end servers send anything
            data += self._stream.decompress(packed, room - len(data))
            packed = self._stream.unused_data
        return data


def _window(packed: bytes) -> int:
    """How zlib is to read it: gzip, zlib, or, as some servers send deflate, without any header."""
    if packed.startswith(b"\x1f\x8b"):
        return 16 + zlib.MAX_WBITS
    has_header = packed[0] & 15 == 8 and int.from_bytes(packed[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


def _too_large(url: str, max_bytes: int) -> DocumentError:
    return DocumentError(f"{url} is larger than {max_bytes // 10**6} MB.")


def _unreachable(url: str, reason: str) -> DocumentError:
    return DocumentError(f"{url} cannot be reached ({reason}); check the address and the network.")


def _status(code: int) -> str:
    """With the standard's words for it, not the server's."""
    try:
        return f"{code} {http.HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)


def _reason(error: BaseException) -> str:
    """What the system said, which is the cause of what the library says."""
    text = str(error) or type(error).__name__
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if isinstance(found, OSError) and found.strerror:
            text = found.strerror
            if found.errno and (type(found) is OSError or isinstance(found, ConnectionError)):
                text = os.strerror(found.errno)  # asyncio puts the number of the socket there
        found = found.__cause__ or found.__context__
    return " ".join(text.split()).rstrip(".")
