"""Fetching a document from the web, with limits on time and size."""

from __future__ import annotations

import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message

from leankv_mlx.errors import DocumentError

SCHEMES = ("http://", "https://")
WAIT_SECONDS = 15.0
"""How long a server may stay silent."""
TOTAL_SECONDS = 120.0
_PIECE = 1 << 16


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
    """Get a page or file.

    Raises:
        DocumentError: no network, no such page, too large, or too slow.
    """
    from leankv_mlx import __version__

    agent = {"User-Agent": f"leankv-mlx/{__version__}", "Accept": "text/html,text/*,*/*"}
    end = time.monotonic() + TOTAL_SECONDS
    try:
        request = urllib.request.Request(url, headers=agent)
        with _opener().open(request, timeout=WAIT_SECONDS) as answer:
            headers: Message = answer.headers
            if int(headers.get("Content-Length") or 0) > max_bytes:
                raise _too_large(url, max_bytes)
            data = bytearray()
            while piece := answer.read1(_PIECE):
                data += piece
                if len(data) > max_bytes:
                    raise _too_large(url, max_bytes)
                if time.monotonic() > end:
                    raise DocumentError(f"{url} took more than {TOTAL_SECONDS:.0f} seconds.")
    except urllib.error.HTTPError as error:
        raise DocumentError(f"{url} is not given: {error.code} {error.reason}.") from error
    except (OSError, ValueError, urllib.error.URLError, EOFError) as error:
        raise DocumentError(
            f"{url} cannot be reached ({_reason(error)}); check the address and the network."
        ) from error
    except Exception as error:  # http.client has errors of its own
        raise DocumentError(f"{url} sent no proper answer ({_reason(error)}).") from error
    parts = urllib.parse.urlsplit(url)
    name = parts.path.rstrip("/").rsplit("/", 1)[-1] or parts.netloc
    charset = headers.get_content_charset() or ""
    return Fetched(name, bytes(data), headers.get_content_type(), charset)


def _opener() -> urllib.request.OpenerDirector:
    """Only http and https, after redirections too: urllib's own would also open local files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _too_large(url: str, max_bytes: int) -> DocumentError:
    return DocumentError(f"{url} is larger than {max_bytes // 10**6} MB.")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")
