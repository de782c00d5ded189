"""The main screen with a scripted engine: replies, stops, scrolling, keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.app.harness import LOADED, SNAPSHOT, Driver, drive  # isort: skip

from leankv_app.options import Options
from leankv_mlx.engine.events import (
    Downloading,
    Failed,
    Loading,
    Prefill,
    Stopped,
    Text,
)
from leankv_mlx.engine.requests import Load

FENCE = ("Here it is:\n\n", "```python\n", "def f(x):\n", "    return x + 1\n")


def test_first_start(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.shows("/file PATH")
        assert d.engine.started
        assert d.engine.requests[0] == Load("", "leankv:k4v4", 0)
        assert d.app.focused is d.screen.prompt
        await d.emit(Loading(""))
        await d.shows("loading the demo model")
        await d.loaded()
        await d.shows("demo model · leankv:k4v4 · cpu")
        assert "loading" not in d.text
        for line in ("/model qwen2.5-0.5b 278.00 MB", "/model qwen3-4b-2507 2.26 GB", "/demo"):
            await d.shows(line)
        d.matches("first_start")

    app = drive(script, tmp_path)
    assert app.engine.closed
    assert app.last_words == []


def test_a_reply_with_an_open_code_fence_loses_nothing(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("write a function")
        for piece in FENCE:
            d.engine.say(piece, done=False)
            await d.pilot.pause(0.05)
        await d.shows("return x + 1")
        await d.emit(replace(SNAPSHOT, request=d.engine.reply.request))
        d.matches("streaming_open_fence")
        d.engine.say("    # the fence stays open")
        await d.shows("the fence stays open")
        for line in ("Here it is:", "def f(x):", "return x + 1"):
            assert line in d.text
        message = d.screen.chat.messages[-1]
        assert message.text == "".join(FENCE) + "    # the fence stays open"
        assert message.status == "done"

    drive(script, tmp_path)


def test_stopping_while_the_prompt_is_read(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("a long question")
        number = d.engine.reply.request
        await d.emit(Prefill(number, 512, 2048, 0))
        await d.shows("reading the prompt")
        await d.pilot.press("escape")
        assert d.engine.stopped == [number]
        await d.emit(Stopped(number, "prefill", 0))
        await d.shows("(stopped)")
        assert "reading the prompt" not in d.text
        await d.said("again", "A reply.")
        assert [turn.role for turn in d.engine.reply.turns] == ["user"]  # merged: they alternate

    drive(script, tmp_path)


def test_stopping_a_reply_keeps_what_was_said(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("tell me a story")
        d.engine.say("Once upon ", "a time", done=False)
        await d.shows("Once upon a time")
        await d.pilot.press("escape")
        number = d.engine.reply.request
        assert d.engine.stopped == [number]
        await d.emit(Stopped(number, "decode", 4))
        await d.shows("(stopped)")
        assert "Once upon a time" in d.text
        d.matches("stopped")
        await d.said("go on", "the end.")
        assert d.engine.reply.turns[1].text == "Once upon a time"

    drive(script, tmp_path)


def test_scrolled_up_while_streaming(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("count")
        number = d.engine.reply.request
        await d.emit(*(Text(number, f"line {i}\n\n", i) for i in range(60)))
        await d.shows("line 59")
        assert not d.screen.query_one("#chip").display
        await d.pilot.press("pageup")
        await d.until(lambda: d.screen.query_one("#chip").display)
        at = d.screen.conversation.messages.scroll_y
        await d.emit(*(Text(number, f"line {i}\n\n", i) for i in range(60, 80)))
        await d.pilot.pause(0.1)
        assert d.screen.conversation.messages.scroll_y == at
        assert "jump to latest" in d.text
        d.matches("scrolled_up")
        d.screen.conversation.messages.focus()
        await d.pilot.press("end")
        await d.shows("line 79")
        assert not d.screen.query_one("#chip").display
        await d.emit(*(Text(number, f"line {i}\n\n", i) for i in range(80, 90)))
        await d.shows("line 89")

    drive(script, tmp_path)


def test_a_long_reply_is_cut_into_parts_and_stays_whole(tmp_path: Path) -> None:
    pieces = [f"Paragraph {i} is about nothing in particular.\n\n" for i in range(120)]

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("a lot")
        for start in range(0, len(pieces), 10):
            d.engine.say(*pieces[start : start + 10], done=False)
            await d.pilot.pause(0.05)
        d.engine.say("The end.")
        await d.shows("The end.")
        parts = [part.text for part in d.screen.query("ReplyMessage Segment")]
        assert len(parts) > 3
        assert "".join(parts) == "".join(pieces) + "The end."
        await d.until(lambda: d.screen.query("Segment").first().asleep)
        d.screen.conversation.messages.scroll_home(animate=False)
        await d.shows("Paragraph 0 is")

    drive(script, tmp_path)


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light"])
@pytest.mark.parametrize("size", [(80, 24), (130, 36)])
def test_narrow_and_wide_dark_and_light(tmp_path: Path, size: tuple[int, int], theme: str) -> None:
    async def script(d: Driver) -> None:
        d.app.theme = theme
        await d.loaded()
        await d.said("What is the access code?", "The access code is **48213**.")
        await d.emit(SNAPSHOT)
        assert d.screen.panel.display == (size[0] >= 100)
        assert "3.10x smaller" in d.text
        assert "7,121" in d.text
        d.matches(f"chat_{size[0]}x{size[1]}_{theme.removeprefix('textual-')}")

    drive(script, tmp_path, size)


def test_the_panel_has_two_views_and_details(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.emit(SNAPSHOT)
        assert "scales" in d.text
        assert "32%" not in d.text
        await d.pilot.press("f2", "v", "d")
        await d.shows("32%")
        assert "scales" not in d.text
        d.matches("panel_gauges")
        await d.pilot.press("ctrl+b")
        await d.until(lambda: not d.screen.panel.display)
        assert d.app.focused is d.screen.prompt

    drive(script, tmp_path, (110, 32))


def test_a_download_shows_how_far_it_is(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.emit(Loading("owner/name"), Downloading("owner/name", 10**9, 4 * 10**9))
        await d.shows("downloading owner/name: 1.00 GB of 4.00 GB")
        d.matches("download")
        await d.emit(LOADED)
        await d.until(lambda: "downloading" not in d.text)

    drive(script, tmp_path, options=Options(model="owner/name"))


@pytest.mark.parametrize(
    ("event", "title"),
    [
        (Failed(0, "load", "there is no folder x/y, and the hub cannot be reached"), "Model"),
        (Failed(0, "load", "x/y is gated: accept its terms on its hub page"), "Model"),
        (Failed(0, "load", "the disk is full while x/y is downloaded; make room"), "Model"),
        (Failed(0, "load", "/x is not a model: it has no config.json."), "Model"),
        (Failed(0, "kv", "no model is loaded; choose one."), "Compression"),
    ],
)
def test_error_dialogs(tmp_path: Path, event: Failed, title: str) -> None:
    async def script(d: Driver) -> None:
        await d.emit(Loading("x/y"), event)
        await d.shows(title)
        assert event.message[1:40] in " ".join(d.text.replace("│", " ").split())
        if "gated" in event.message:
            d.matches("error_dialog")
        await d.pilot.press("escape")
        await d.until(lambda: len(d.app.screen_stack) == 2)
        assert d.app.focused is d.screen.prompt

    drive(script, tmp_path, (80, 24))


def test_a_question_that_fails_does_not_spoil_the_next(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("word " * 50)
        number = d.engine.reply.request
        await d.emit(Failed(number, "reply", "the prompt has 9000 tokens and the context 8192"))
        await d.shows("No reply")
        await d.pilot.press("enter")
        await d.shows("(not answered)")
        await d.said("short", "Yes.")
        assert [turn.text for turn in d.engine.reply.turns] == ["short"]
        await d.pilot.press("ctrl+r")
        await d.until(lambda: d.screen.chat.busy)
        assert [turn.text for turn in d.engine.reply.turns] == ["short"]

    drive(script, tmp_path)


def test_history_and_newlines(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        prompt = d.screen.prompt
        await d.said("first", "A.")
        await d.said("second", "B.")
        prompt.text = "draft"
        await d.pilot.press("up", "up")
        assert prompt.text == "first"
        await d.pilot.press("down", "down")
        assert prompt.text == "draft"
        prompt.text = ""
        await d.pilot.press("a", "ctrl+j", "b")
        assert prompt.text == "a\nb"
        await d.pilot.press("enter")
        assert d.engine.reply.turns[-1].text == "a\nb"

    drive(script, tmp_path)


def test_keys_to_quit_and_copy(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.pilot.press("ctrl+c")
        await d.shows("Ctrl+C again to quit")
        await d.pilot.press("ctrl+c")
        await d.pilot.pause(0.1)
        assert d.app._exit

    drive(script, tmp_path)


def test_every_binding_has_an_id(tmp_path: Path) -> None:
    from leankv_app.app import ChatApp
    from leankv_app.screens import dialog, help, models, sessions, settings
    from leankv_app.widgets.conversation import Messages
    from leankv_app.widgets.memory_panel import MemoryPanel

    owners = [
        ChatApp, dialog.MessageDialog, dialog.ConfirmDialog, dialog.TextDialog, help.HelpScreen,
        models.ModelsScreen, sessions.SessionsScreen, settings.SettingsScreen, Messages,
        MemoryPanel,
    ]  # fmt: skip
    ids = [binding.id for owner in owners for binding in owner.BINDINGS]
    assert all(ids)
    assert len(set(ids)) == len(ids)
