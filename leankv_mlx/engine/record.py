"""Events as JSON lines, one per event with its time, and an engine that plays them back."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, get_args, get_origin, get_type_hints

from leankv_mlx.engine.events import (
    EVENTS,
    Done,
    Event,
    Failed,
    Loaded,
    Noted,
    Prefill,
    Snapshot,
    Stage,
    Stopped,
    Text,
)
from leankv_mlx.engine.requests import Emit, Load, Read, Reply, Request
from leankv_mlx.errors import UsageError

_BY_NAME = {kind.__name__: kind for kind in EVENTS}
_MOST = 2**63
_OF_REPLY = (Prefill, Text, Snapshot, Done, Stopped, Failed)


class Recorder:
    """Passes events on and writes them down.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, emit: Emit) -> None:
        self._emit = emit
        self._start = time.monotonic()
        try:
            self._file: IO[str] = path.open("w", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"cannot write the recording {path}: {error.strerror}.") from error

    def __call__(self, event: Event) -> None:
        self._emit(event)
        if self._file.closed:
            return
        try:
            self._file.write(dumped(event, time.monotonic() - self._start) + "\n")
            self._file.flush()
        except OSError as error:  # the reply goes on without
            self.close()
            self._emit(Noted(f"the recording ends here: {error.strerror}."))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what did not fit the disk is tried once more, and is then gone
            self._file.close()


def dumped(event: Event, seconds: float) -> str:
    """One line."""
    row = {"t": round(seconds, 3), "event": type(event).__name__, **asdict(event)}
    return json.dumps(row, ensure_ascii=False)


def read(path: Path) -> list[tuple[float, Event]]:
    """The events of a recording with their times.

    Raises:
        UsageError: the file is not a recording.
    """
    try:
        # Not splitlines, for which a reply may hold further ends of lines.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text in UTF-8"
        raise UsageError(f"cannot read the recording {path}: {reason}.") from error
    return [_event(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _event(path: Path, number: int, line: str) -> tuple[float, Event]:
    try:
        row: dict[str, Any] = json.loads(line)
        seconds, kind = _checked(float, row.pop("t")), _BY_NAME[row.pop("event")]
        return seconds, _built(kind, row)
    except (ValueError, RecursionError, OverflowError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} is not a recording: line {number} is not an event.") from None


def _built(kind: Any, row: Any) -> Any:
    """A dataclass from a parsed object, each value of the type that its field has.

    Raises:
        TypeError, ValueError, LookupError: it does not fit.
    """
    hints = get_type_hints(kind)
    return kind(**{name: _checked(hints[name], value) for name, value in row.items()})


def _checked(hint: Any, value: Any) -> Any:
    """A parsed value, if it is one of a type: what an app computes with has to be a number, and
    one that it can show."""
    if is_dataclass(hint):
        return _built(hint, value)
    arguments = get_args(hint)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_checked(arguments[0], item) for item in value)
    if get_origin(hint) is Literal and value in arguments:
        return value
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise TypeError(f"{hint} expected")
    if isinstance(value, str):
        value.encode()  # a lone half of a pair cannot be shown
    elif not abs(value) <= _MOST:  # nor can what is not a number
        raise ValueError("out of range")
    return value


class ReplayEngine:
    """Answers requests with recorded events: `Load` with those before the first reply, every
    `Reply` or `Read` with the next recorded one under the new request's number.

    Args:
        events: from `read`.
        emit: receives the events, in this engine's thread.
        speed: how many times faster than recorded; 0 waits nowhere.
    """

    def __init__(self, events: list[tuple[float, Event]], emit: Emit, speed: float = 1.0) -> None:
        self._emit = emit
        self._speed = speed
        self._before, self._replies = _split(events)
        self._played = 0
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leankv-replay", daemon=True)

    def start(self) -> None:
        """Begin to serve requests."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Serve a request after those before it."""
        self._requests.put(request)

    def stop(self, request: int) -> None:
        """Stop a reply, running or waiting."""
        self._stopped.add(request)

    def close(self, timeout: float = 10.0) -> None:
        """Stop everything and wait for the thread."""
        self._closing.set()
        self._requests.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None and not self._closing.is_set():
            if isinstance(request, Load):
                self._load(request)
            elif isinstance(request, Reply | Read):
                self._reply(request.request)

    def _load(self, request: Load) -> None:
        for event in self._paced(self._before):
            self._emit(replace(event, model=request.model) if isinstance(event, Loaded) else event)

    def _reply(self, number: int) -> None:
        if self._played >= len(self._replies):
            self._emit(Failed(number, "reply", "the recording has no further reply."))
            return
        events = self._replies[self._played]
        self._played += 1
        stage: Stage = "prefill"
        tokens = 0
        for event in self._paced(events, number):
            if number in self._stopped:
                break
            if isinstance(event, Text):
                stage, tokens = "decode", event.tokens
            self._emit(_renumbered(event, number))
        if number in self._stopped:
            self._emit(Stopped(number, stage, tokens))

    def _paced(self, events: list[tuple[float, Event]], number: int = -1) -> Iterator[Event]:
        start = time.monotonic()
        first = events[0][0] if events else 0.0
        for seconds, event in events:
            while self._speed and not self._closing.is_set() and number not in self._stopped:
                wait = (seconds - first) / self._speed - (time.monotonic() - start)
                if wait <= 0:
                    break
                time.sleep(min(wait, 0.05))
            if self._closing.is_set():
                return
            yield event


def _renumbered(event: Event, number: int) -> Event:
    return replace(event, request=number) if isinstance(event, _OF_REPLY) else event


def _split(
    events: list[tuple[float, Event]],
) -> tuple[list[tuple[float, Event]], list[list[tuple[float, Event]]]]:
    """Events that belong to no reply, up to the first one, and those of each reply in order."""
    before: list[tuple[float, Event]] = []
    replies: dict[int, list[tuple[float, Event]]] = {}
    for seconds, event in events:
        number = getattr(event, "request", 0)
        if number:
            replies.setdefault(number, []).append((seconds, event))
        elif not replies:
            before.append((seconds, event))
    return before, list(replies.values())
