"""The process that parses documents, within limits: `isolated` starts it.

It reads requests from stdin and writes a reply for each to stdout, both as messages: the length of
a header in 8 bytes, the header as JSON, and as many bytes of content as the header says. It imports
neither mlx nor textual.

Three things end it early. The kernel refuses memory beyond the limit where it can (Linux), and
stops a process that computes for too long. A thread looks at the memory in use for the systems
that do not (macOS), and at whether the process that waits for the reply still lives.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, BinaryIO

TOO_MUCH_MEMORY = 101
"""Exit code of a process that ended itself because of the memory limit."""
_LOOK_SECONDS = 0.05
_LENGTH_BYTES = 8
_LONGEST_REASON = 300  # characters


def message(header: dict[str, Any], content: bytes) -> bytes:
    """A request or a reply as bytes."""
    # JSON in ASCII also carries the halves of surrogate pairs that strange file names have.
    head = json.dumps(header | {"bytes": len(content)}).encode("ascii")
    return b"".join((len(head).to_bytes(_LENGTH_BYTES, "big"), head, content))


def received(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next header and content; None if there is no whole one."""
    head = stream.read(int.from_bytes(stream.read(_LENGTH_BYTES), "big"))
    if not head:
        return None
    try:
        header: dict[str, Any] = json.loads(head)
    except ValueError:
        return None
    content = stream.read(header["bytes"])
    return (header, content) if len(content) == header["bytes"] else None


def reply(header: dict[str, Any], raw: bytes) -> bytes:
    """Parse one document.

    Args:
        header: `document`, further arguments of `parsed`, and `characters`, the longest text that
            may come out.

    Returns:
        A message whose `kind` is "text", with the text as its content and `note`; "document" or
        "usage" with the `text` of that error; "memory"; or "failed" with `text` and `traceback`.
    """
    from leankv_mlx.documents.parse import parsed
    from leankv_mlx.errors import DocumentError, UsageError

    name = header["document"]["name"]
    try:
        text, note = parsed(raw, **header["document"])
        if len(text) > header["characters"]:
            raise DocumentError(
                f"{name} has a text of {len(text) / 1e6:,.0f} million characters and the limit is "
                f"{header['characters'] / 1e6:,.0f}; give a part of it."
            )
        content = text.encode("utf-8", "replace")  # halves of surrogate pairs are no text
        return message({"kind": "text", "note": note}, content)
    except MemoryError:
        return message({"kind": "memory"}, b"")
    except DocumentError as error:
        return message({"kind": "document", "text": str(error)}, b"")
    except UsageError as error:
        return message({"kind": "usage", "text": str(error)}, b"")
    except Exception as error:  # whatever a library raises on what nobody has thought of
        import traceback

        text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        trace = "".join(traceback.format_exception(error))
        return message({"kind": "failed", "text": text, "traceback": trace}, b"")


def main() -> None:
    """Serve requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply
    watched = False
    while (request := received(sys.stdin.buffer)) is not None:
        header, raw = request
        _limit(header["seconds"], header["memory"])
        if not watched:
            watched = True
            given = header["parent"], header["memory"]
            threading.Thread(target=_watch, args=given, daemon=True).start()
        replies.write(reply(header, raw))
        replies.flush()


def _limit(seconds: int, memory: int) -> None:
    """Have the kernel end what goes on for too long, and refuse what is too much memory."""
    try:
        import resource
    except ImportError:  # a system without
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = int(used.ru_utime + used.ru_stime) + seconds + 1
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, end)]
    if sys.platform == "linux":  # macOS does not take it
        limits.append((resource.RLIMIT_DATA, memory))
    for kind, most in limits:
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))


def _watch(parent: int, memory: int) -> None:
    """End the process when it takes too much, or when nobody waits for it any more."""
    while True:
        if _memory() > memory:
            os._exit(TOO_MUCH_MEMORY)
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(_LOOK_SECONDS)


def _memory() -> int:
    """Bytes of memory in use: now on Linux, at most so far elsewhere; 0 if it cannot be known."""
    if sys.platform == "linux":
        # Not `ru_maxrss`: there it begins with what the parent had when it made this process.
        try:
            with open("/proc/self/statm", "rb") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # the kernel's limit is there anyway
            return 0
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
