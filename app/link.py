"""From the engine's thread to the app: pieces are collected for 40 ms and posted as one message."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from textual.message import Message

from leankv_mlx.engine.events import Downloading, Event, Prefill, Snapshot, Text

COALESCE_SECONDS = 0.04
_LATEST_WINS = (Prefill, Downloading, Snapshot)


@dataclass
class EngineEvents(Message):
    """What the engine said since the last message."""

    events: list[Event]


class EngineLink:
    """Callable from any thread once `connect` was called in the app's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[Event] = []
        self._scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._post: Callable[[EngineEvents], object] = lambda message: None

    def connect(self, post: Callable[[EngineEvents], object]) -> None:
        """Begin to post; what came before is posted too."""
        self._loop = asyncio.get_running_loop()
        self._post = post
        with self._lock:
            self._schedule()

    def __call__(self, event: Event) -> None:
        with self._lock:
            _append(self._pending, event)
            self._schedule()

    def _schedule(self) -> None:
        if self._scheduled or self._loop is None or not self._pending:
            return
        self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._loop.call_later, COALESCE_SECONDS, self._flush)
        except RuntimeError:
            self._loop = None  # the app has gone

    def _flush(self) -> None:
        with self._lock:
            events, self._pending = self._pending, []
            self._scheduled = False
        if events:
            self._post(EngineEvents(events))


def _append(pending: list[Event], event: Event) -> None:
    """Neighbouring pieces of text become one; of progress only the latest counts."""
    last = pending[-1] if pending else None
    if isinstance(event, Text) and isinstance(last, Text) and last.request == event.request:
        pending[-1] = replace(event, text=last.text + event.text)
    elif isinstance(event, _LATEST_WINS) and type(last) is type(event):
        pending[-1] = event
    else:
        pending.append(event)
