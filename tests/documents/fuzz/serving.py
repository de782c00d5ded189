"""The product's child process, serving many documents in a row under the product's limits."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from leankv_mlx.documents import child, isolated

SECONDS = 15
_LARGE = 300 * 10**6
"""A process that has taken so many bytes is replaced, so that memory is told for each document."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one document.

    Attributes:
        kind: of the reply, or "time" or "crash" where there is none.
        text: of the document or the error.
        nbytes: most memory that the process has had.
    """

    kind: str
    text: str
    seconds: float
    nbytes: int


class Serving:
    """Use it as a context manager."""

    def __enter__(self) -> Serving:
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _begin(self) -> None:
        self._process: subprocess.Popen[bytes] = isolated.start()
        self._replies: queue.SimpleQueue[tuple[dict[str, object], bytes] | None] = (
            queue.SimpleQueue()
        )
        given = self._process, self._replies
        threading.Thread(target=_receive, args=given, daemon=True).start()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def parse(self, raw: bytes, name: str) -> Outcome:
        """Parse one document."""
        header = {
            "document": {"name": name},
            "parent": os.getpid(),
            "seconds": SECONDS,
            "memory": isolated.MAX_MEMORY,
            "characters": isolated.MAX_CHARACTERS,
        }
        start = time.monotonic()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(child.message(header, raw))
            self._process.stdin.flush()
            reply = self._replies.get(timeout=SECONDS)
            kind = "crash"
        except OSError:
            reply, kind = None, "crash"
        except queue.Empty:
            reply, kind = None, "time"
        nbytes, seconds = _peak(self._process.pid), time.monotonic() - start
        if reply is None:
            self._end()
            if self._process.returncode == child.TOO_MUCH_MEMORY:
                kind = "memory"
            self._begin()
            return Outcome(kind, "", seconds, nbytes)
        if nbytes > _LARGE:
            self._end()
            self._begin()
        said, content = reply
        text = content.decode("utf-8") or str(said.get("traceback") or said.get("text", ""))
        return Outcome(str(said["kind"]), text, seconds, nbytes)


def _receive(
    process: subprocess.Popen[bytes],
    replies: queue.SimpleQueue[tuple[dict[str, object], bytes] | None],
) -> None:
    assert process.stdout is not None
    with process.stdout:
        while (reply := child.received(process.stdout)) is not None:
            replies.put(reply)
    replies.put(None)


def _peak(pid: int) -> int:
    """Most memory of a process that lives, where the system tells it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
