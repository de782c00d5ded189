"""How fast the app is to look at: first paint, frames while a model generates, long replies."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from leankv_app.app import ChatApp
from leankv_app.factory import make_app
from leankv_app.options import Options
from leankv_app.paths import Paths
from leankv_mlx.engine.events import Done, Loaded, Prefill, Text
from leankv_mlx.engine.record import ReplayEngine
from leankv_mlx.engine.requests import Emit, Request

REPLY_TOKENS = 5000
FRAME_HZ = 30
_BATCH = 25  # tokens that arrive together at some 600 tokens per second
_WINDOW = 500

_FIRST_PAINT = """
import sys, time
start = float(sys.argv[1])
from leankv_app.factory import make_app
from leankv_app.options import Options
from leankv_app.paths import paths

app = make_app(Options(), paths())
painted = app._start

def first_paint():
    seconds, cpu = time.time() - start, time.process_time()
    print(seconds, cpu, *{name.partition(".")[0] for name in sys.modules}, flush=True)
    app.exit()

app._start = first_paint
app.run(headless=True, size=(100, 30))
"""


def measure_ui(repeats: int = 3) -> dict[str, Any]:
    """Seconds, frames per second, and the slowdown of a long reply.

    `first_paint_seconds` is from the start of the process to the first complete frame, the best
    of `repeats`, and `first_paint_cpu_seconds` what the process itself needed. `slowdown` compares
    the CPU time per batch of text at the end of a reply of 5,000 tokens with that after the first
    100.
    """
    paints = [_first_paint() for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        fps = asyncio.run(_frames(Path(folder)))
        early, late = asyncio.run(_long_reply(Path(folder)))
    return {
        "first_paint_seconds": min(paint[0] for paint in paints),
        "first_paint_cpu_seconds": min(paint[1] for paint in paints),
        "first_paint_imports_mlx": any("mlx" in paint[2] for paint in paints),
        "frames_per_second": fps,
        "batch_seconds_at_100": early,
        "batch_seconds_at_5000": late,
        "slowdown": late / early - 1,
    }


def _first_paint() -> tuple[float, float, set[str]]:
    """Seconds, CPU seconds, and the packages that were imported."""
    with tempfile.TemporaryDirectory() as home:
        ran = subprocess.run(
            [sys.executable, "-c", _FIRST_PAINT, repr(time.time())],
            env=os.environ | {"LEANKV_HOME": home},
            capture_output=True,
            text=True,
            check=True,
        )
    seconds, cpu, *packages = ran.stdout.split()
    return float(seconds), float(cpu), set(packages)


def _app(folder: Path, make_engine: Any = None) -> ChatApp:
    places = Paths(folder / "chats.db", folder / "settings.json", folder)
    return make_app(Options(), places, make_engine)


async def _frames(folder: Path, seconds: float = 4.0) -> float:
    """Rate of a timer of the app while the demo model generates; the app draws meanwhile."""
    app = _app(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        screen = app.chat_screen
        await _until(pilot, lambda: screen.loaded is not None)
        await screen.ask("Tell me a long story about a lighthouse. " * 20)
        await _until(pilot, lambda: bool(screen.chat.messages[-1].text))
        ticks = 0

        def tick() -> None:
            nonlocal ticks
            ticks += 1

        start = time.perf_counter()
        timer = screen.set_interval(1 / FRAME_HZ, tick)
        while time.perf_counter() - start < seconds and screen.chat.busy:
            await asyncio.sleep(0.05)
        timer.stop()
        return ticks / (time.perf_counter() - start)


async def _until(pilot: Any, condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the app did not get there in time")
        await pilot.pause(0.02)


def long_reply() -> list[str]:
    """A reply of 5,000 tokens as a model writes: headings, lists, code and paragraphs."""
    words = [
        "the",
        "cache",
        "of",
        "this",
        "layer",
        "keeps",
        "its",
        "recent",
        "tokens",
        "exactly",
        "and",
        "the",
        "rest",
        "in",
        "codes",
    ]
    tokens: list[str] = []
    section = 0
    while len(tokens) < REPLY_TOKENS:
        section += 1
        tokens += [f"\n\n## Part {section}\n\n"]
        tokens += [f"{word} " for word in words * 3]
        tokens += ["\n\n- ", *[f"{word} " for word in words], "\n- ", *[f"{w} " for w in words]]
        tokens += ["\n\n```python\n", *[f"{word} = {i}\n" for i, word in enumerate(words)], "```\n"]
    return tokens[:REPLY_TOKENS]


class _Idle(ReplayEngine):
    """An engine that loads at once and leaves the replies to the measurement."""

    def __init__(self, emit: Emit) -> None:
        loaded = Loaded("", "replay", 8192, "leankv", "none", 1, 1, "", 0, 0)
        super().__init__([(0.0, loaded)], emit, speed=0)

    def submit(self, request: Request) -> None:
        """Only loading is answered."""
        if type(request).__name__ == "Load":
            super().submit(request)


async def _long_reply(folder: Path) -> tuple[float, float]:
    """CPU seconds of a batch after token 100 and at the end: the lower quartile, because a busy
    machine makes any of them slower."""
    app = _app(folder, _Idle)
    tokens = long_reply()
    times: list[float] = []
    async with app.run_test(size=(120, 40)) as pilot:
        screen = app.chat_screen
        await _until(pilot, lambda: screen.loaded is not None)
        await screen.ask("Explain the cache.")
        number = screen.chat.request
        await screen._handle(Prefill(number, 1, 1, 0))
        for at in range(0, len(tokens), _BATCH):
            start = time.process_time()  # the slowdown must not be that of other programs
            text = "".join(tokens[at : at + _BATCH])
            await screen._handle(Text(number, text, at + _BATCH))
            await pilot.pause()
            times.append(time.process_time() - start)
        await screen._handle(Done(number, "stop", 1, 0, len(tokens), 0.1, 1.0))
    first, last = 100 // _BATCH, _WINDOW // _BATCH
    early, late = times[first : first + last], times[-last:]
    return statistics.quantiles(early, n=4)[0], statistics.quantiles(late, n=4)[0]


if __name__ == "__main__":
    print(json.dumps(measure_ui(), indent=2))
