"""Reading documents beside the screen: it can be stopped, and nothing waits for it at the end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from leankv_app.widgets.progress import ProgressLine
from leankv_mlx.documents.readers import Document, read_document, shown


class OpeningStopped(Exception):
    """The user does not want the document any more."""


class Openings:
    """The documents that are on their way."""

    def __init__(self) -> None:
        self._running: set[_Opening] = set()

    async def document(self, source: str, progress: ProgressLine) -> Document:
        """Read a document, with a line that says what is waited for.

        Raises:
            DocumentError, UsageError: as `read_document`.
            OpeningStopped: `stop` was called.
        """
        opening = _Opening(source)
        self._running.add(opening)
        said = not progress.display  # a model that loads has the line already
        if said:
            progress.wait(f"opening {shown(source.rstrip('/').rpartition('/')[2])} …")
        try:
            return await opening.document()
        finally:
            self._running.discard(opening)
            if said:
                progress.end()

    def stop(self) -> bool:
        """Give all of them up, at once; False if there is none."""
        for opening in self._running:
            opening.stop()
        return bool(self._running)


class _Opening:
    """One of them.

    It is read in a daemon thread. Those of `asyncio.to_thread` are waited for when the app ends,
    and a server may be silent, or a document be parsed, for many seconds.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._document: asyncio.Future[Document] = self._loop.create_future()

    async def document(self) -> Document:
        threading.Thread(target=self._read, name="leankv-opening", daemon=True).start()
        try:
            return await self._document
        finally:
            self._stopped.set()

    def stop(self) -> None:
        self._end(OpeningStopped())

    def _read(self) -> None:
        try:
            outcome: Document | Exception = read_document(self._source, look=self._look)
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the app has gone
            self._loop.call_soon_threadsafe(self._end, outcome)

    def _look(self) -> None:
        if self._stopped.is_set():
            raise OpeningStopped

    def _end(self, outcome: Document | Exception) -> None:
        if self._document.done():
            return
        if isinstance(outcome, Exception):
            self._document.set_exception(outcome)
        else:
            self._document.set_result(outcome)
