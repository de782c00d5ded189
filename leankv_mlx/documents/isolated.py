"""Parsing a document in a process of its own, with limits on time, memory and output.

A document of a few kilobytes can keep a parser busy without end, take all memory, or bring down a
library of C. The process that does it (`child`) can be ended at any moment, and takes nothing with
it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from leankv_mlx.documents import child
from leankv_mlx.errors import DocumentError, UsageError
from leankv_mlx.faults import keep

MAX_MEMORY = 2 * 10**9
"""Bytes that a parser may take."""
MAX_CHARACTERS = 100 * 10**6
"""The longest text of a document."""
_SECONDS = 15
_BYTES_A_SECOND = 10**6
"""A large document gets a second more for each of these."""
_LOOK_SECONDS = 0.05

Look = Callable[[], None]
"""Called some times a second while there is something to wait for; may raise to stop."""


def no_look() -> None:
    """Never stops anything."""


def isolated_text(
    raw: bytes,
    name: str,
    media_type: str = "",
    encoding: str = "",
    charset: str = "",
    look: Look = no_look,
) -> tuple[str, str]:
    """The text of a document, and what should be said about it; see `parsed`.

    Raises:
        DocumentError: it cannot be read, or not within the limits.
        UsageError: there is no such encoding.
    """
    seconds = _SECONDS + len(raw) // _BYTES_A_SECOND
    header = {
        "document": {
            "name": name,
            "media_type": media_type,
            "encoding": encoding,
            "charset": charset,
        },
        "parent": os.getpid(),
        "seconds": seconds,
        "memory": MAX_MEMORY,
        "characters": MAX_CHARACTERS,
    }
    look()
    try:
        process = start()
        _send(process, child.message(header, raw))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no thread left
        raise DocumentError(
            f"{name} cannot be read: no process can be started for it "
            f"({getattr(error, 'strerror', None) or error})."
        ) from error
    out = _said(process, seconds, look)
    if out is None:
        raise DocumentError(
            f"{name} takes more than {seconds} seconds to read; save it as plain text, or give a "
            "part of it."
        )
    answer = child.received(io.BytesIO(out))
    if answer is not None:
        return _unpacked(name, *answer)
    if process.returncode == child.TOO_MUCH_MEMORY:
        raise _too_much_memory(name)
    raise DocumentError(
        f"{name} cannot be read: it brings its reader down (exit code {process.returncode}); it is "
        "damaged, or takes too much memory. Save it as plain text."
    )


def start() -> subprocess.Popen[bytes]:
    """A process that serves requests; see `child`.

    Raises:
        OSError: the system gives no process.
    """
    if not sys.executable:
        raise OSError("the Python that runs this is not known")
    # It finds the packages where this process has found them, however that was installed or
    # started, and nothing in the folder that it happens to be started in (-P).
    paths = [path for path in map(os.path.abspath, sys.path) if os.pathsep not in path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OPENBLAS_NUM_THREADS": "1",  # its threads would only take memory
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", child.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what C libraries say would go over the screen of the chat
        env=environment,
    )


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    """Send a request, and nothing after it, in a thread: a pipe takes some kilobytes at a time."""
    stdin, process.stdin = process.stdin, None
    assert stdin is not None

    def send() -> None:
        with suppress(OSError), stdin:  # OSError: the process has ended
            stdin.write(request)

    try:
        threading.Thread(target=send, daemon=True).start()
    except RuntimeError:
        _end(process)
        raise


def _said(process: subprocess.Popen[bytes], seconds: float, look: Look) -> bytes | None:
    """What a process answers, None if it was not done in time; it has ended."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=_LOOK_SECONDS)[0]
            look()
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _unpacked(name: str, header: dict[str, Any], content: bytes) -> tuple[str, str]:
    match header["kind"]:
        case "text":
            return content.decode("utf-8"), header["note"]
        case "document":
            raise DocumentError(header["text"])
        case "usage":
            raise UsageError(header["text"])
        case "memory":
            raise _too_much_memory(name)
    log = keep(header["traceback"])
    where = f"; the traceback is in {log}" if log else ""
    raise DocumentError(f"{name} cannot be read ({header['text']}{where}).")


def _too_much_memory(name: str) -> DocumentError:
    return DocumentError(
        f"{name} takes more than {MAX_MEMORY / 1e9:.0f} GB of memory to read; save it as plain "
        "text, or give a part of it."
    )
