"""Pictures for the documentation, drawn from a recording: `python -m leankv_app.screenshots`.

With --record the demo model runs once and the recording is made anew.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from textual.pilot import Pilot

from leankv_app.app import ChatApp
from leankv_app.factory import make_app
from leankv_app.options import Options
from leankv_app.paths import Paths

QUESTIONS = (
    "What is the access code of the Oslo archive?",
    "Tell me the mascot of the Lima hotel.",
)
_FACTS = (
    "The access code of the Oslo archive is 48213.",
    "The mascot of the Lima hotel is Silver Otter.",
)
DOCUMENT = "report.txt"


def report() -> str:
    """A document with two facts in it."""
    filler = [
        f"On day {day} the committee met at the harbour and spoke about the weather."
        for day in range(1, 120)
    ]
    return " ".join([*filler[:30], _FACTS[0], *filler[30:90], _FACTS[1], *filler[90:]])


async def _until(pilot: Pilot[None], app: ChatApp) -> None:
    """Wait until the model is there and nothing runs."""
    screen = app.chat_screen
    for _ in range(3000):
        await pilot.pause(0.02)
        if screen.loaded and not screen.chat.busy and not screen.chat.reading:
            break
    await pilot.pause(0.3)


async def _play(folder: Path, options: Options, size: tuple[int, int], theme: str) -> str:
    """The conversation; the SVG at its end."""
    home = folder / "home"
    places = Paths(home / "chats.db", home / "settings.json", home)
    app = make_app(options, places)
    app.animation_level = "none"
    async with app.run_test(size=size) as pilot:
        app.theme = theme
        await _until(pilot, app)
        screen = app.chat_screen
        screen.prompt.cursor_blink = False
        await screen.slash.file(str(folder / DOCUMENT))
        await _until(pilot, app)
        for question in QUESTIONS:
            await screen.ask(question)
            await _until(pilot, app)
        return app.export_screenshot(title="leankv-chat")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="run the demo model first")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    chosen = parser.parse_args(arguments)
    recording = chosen.out / "chat.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / DOCUMENT).write_text(report(), encoding="utf-8")
        if chosen.record:
            asyncio.run(_play(folder, Options(record=recording), (120, 36), "textual-dark"))
        for name, size, theme in (
            ("chat-wide", (120, 36), "textual-dark"),
            ("chat-light", (120, 36), "textual-light"),
            ("chat-narrow", (80, 24), "textual-dark"),
        ):
            options = Options(replay=recording, replay_speed=0)
            picture = asyncio.run(_play(folder, options, size, theme))
            (chosen.out / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
