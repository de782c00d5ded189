"""Driving the app without a terminal: a scripted engine, waiting, and pictures to compare with."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

textual = pytest.importorskip("textual")
pytest.importorskip("leankv_app")

from textual import _wait  # noqa: E402
from textual.pilot import Pilot  # noqa: E402

from leankv_app.app import ChatApp  # noqa: E402
from leankv_app.factory import make_app  # noqa: E402
from leankv_app.options import Options  # noqa: E402
from leankv_app.paths import Paths  # noqa: E402
from leankv_mlx.engine.events import (  # noqa: E402
    Done,
    Event,
    LayerUse,
    Loaded,
    Prefill,
    Snapshot,
    Text,
)
from leankv_mlx.engine.requests import Emit, Read, Reply, Request  # noqa: E402

# A pilot looks four times as often whether the app has come to rest: tests wait for it thousands of
# times. Rest stays what it is for Textual, a twentieth of the time or less at work.
_wait.SLEEP_GRANULARITY /= 4
_wait.SLEEP_IDLE /= 4

SNAPSHOTS = Path(__file__).parent / "snapshots"
MADE_WITH = SNAPSHOTS / "TEXTUAL"
LOADED = Loaded("", "demo model", 8192, "leankv:k4v4", "cpu", 5, 5, "", 9_475_584, 2 * 10**9)
_LAYER = LayerUse(True, 176_640, 548_352, (88_320, 88_320))
SNAPSHOT = Snapshot(
    1, 1071, 2_741_760, 634_880, 39_680, 1_280, 202_240, 5_120, 0, 915_840, 17_840_000, 7121,
    31.4, (_LAYER,) * 5,
)  # fmt: skip


class FakeEngine:
    """Keeps requests; events are those that a test emits."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.requests: list[Request] = []
        self.stopped: list[int] = []
        self.started = False
        self.closed = False

    def start(self) -> None:
        self.started = True

    def submit(self, request: Request) -> None:
        self.requests.append(request)

    def stop(self, request: int) -> None:
        self.stopped.append(request)

    def close(self, timeout: float = 10.0) -> None:
        self.closed = True

    @property
    def reply(self) -> Reply:
        """The last reply that was asked for."""
        return [request for request in self.requests if isinstance(request, Reply)][-1]

    @property
    def read(self) -> Read:
        """The last document that was read."""
        return [request for request in self.requests if isinstance(request, Read)][-1]

    def say(self, *pieces: str, done: bool = True) -> None:
        """Reply with pieces."""
        number = self.reply.request
        self.emit(Prefill(number, 9, 9, 0))
        for index, piece in enumerate(pieces, 1):
            self.emit(Text(number, piece, index))
        if done:
            self.emit(Done(number, "stop", 9, 0, len(pieces), 0.1, 0.2))


class Driver:
    """A running app and what a test does with it."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def engine(self) -> Any:
        return self.app.engine

    @property
    def screen(self) -> Any:
        return self.app.chat_screen

    @property
    def text(self) -> str:
        """What is on the screen."""
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)

    async def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not reached; the screen is\n{self.text}"
            await self.pilot.pause(0.02)
        await self.pilot.pause()

    async def shows(self, text: str, seconds: float = 20.0) -> None:
        """Wait for a text; it may be wrapped."""
        await self.until(
            lambda: text in (now := self.text) or text in " ".join(now.split()), seconds
        )

    async def emit(self, *events: Event) -> None:
        for event in events:
            self.engine.emit(event)
        await self.pilot.pause(0.06)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        """Put a text in the prompt and send it."""
        self.screen.prompt.text = text
        await self.pilot.pause()
        await self.pilot.press("enter")
        await self.pilot.pause()

    async def loaded(self) -> None:
        await self.emit(LOADED, replace(SNAPSHOT, request=0, tokens=0, fp16=0, codes=0, scales=0,
                                        tables=0, exact=0, centers=0, allocated=0, speed=0.0,
                                        context_left=8192, layers=()))  # fmt: skip

    async def said(self, question: str, *pieces: str) -> None:
        """A whole turn."""
        await self.type(question)
        self.engine.say(*pieces)
        await self.until(lambda: not self.screen.chat.busy)

    def matches(self, name: str) -> None:
        """Compare the screen with its picture; LEANKV_SNAPSHOTS=update writes it."""
        version = textual.__version__
        picture = SNAPSHOTS / f"{name}.svg"
        now = self.app.export_screenshot(title=name)
        if os.environ.get("LEANKV_SNAPSHOTS") == "update":
            SNAPSHOTS.mkdir(exist_ok=True)
            picture.write_text(now, encoding="utf-8")
            MADE_WITH.write_text(version + "\n")
        if MADE_WITH.read_text().strip() != version:
            pytest.skip(f"pictures were made with textual {MADE_WITH.read_text().strip()}")
        if now != picture.read_text(encoding="utf-8"):
            actual = Path(tempfile.gettempdir(), picture.name)
            actual.write_text(now, encoding="utf-8")
            raise AssertionError(f"the screen differs from {picture}; it is now in {actual}")


Script = Callable[[Driver], Awaitable[None]]


def places(folder: Path) -> Paths:
    return Paths(folder / "data" / "chats.db", folder / "settings.json", folder / "exports")


def drive(
    script: Script,
    folder: Path,
    size: tuple[int, int] = (80, 24),
    options: Options | None = None,
    make_engine: Any = FakeEngine,
) -> ChatApp:
    """Run a script against the app and return it."""

    async def main() -> ChatApp:
        app = make_app(options or Options(), places(folder), make_engine)
        app.animation_level = "none"
        async with app.run_test(size=size, notifications=True) as pilot:
            driver = Driver(app, pilot)
            await driver.until(lambda: len(app.screen_stack) > 1)
            app.chat_screen.prompt.cursor_blink = False
            await pilot.pause()
            await script(driver)
        return app

    return asyncio.run(main())
