"""Slash commands, and documents, with a scripted engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.app.harness import LOADED, SNAPSHOT, Driver, drive  # isort: skip

from leankv_app.options import Options
from leankv_app.sample import QUESTIONS
from leankv_mlx.engine.events import (
    Noted,
    Prefill,
    Recoded,
    Stopped,
)
from leankv_mlx.engine.requests import Forget, Load, Read, Recode


def test_demo_reads_a_document_that_has_what_can_be_asked(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.emit(replace(LOADED, model="some/model"))
        assert "cannot chat" not in d.text
        await d.loaded()
        await d.shows("cannot chat")
        await d.type("/demo")
        await d.shows("Summarize the document.")
        text = " ".join(d.engine.read.turns[0].text.split())
        for question in QUESTIONS:
            subject = question.removeprefix("Tell me the ").removeprefix("What is the ")[:-1]
            assert f"The {subject} is " in text

    drive(script, tmp_path)


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")

    async def script(d: Driver) -> None:
        prompt = d.screen.prompt
        await d.pilot.press("slash", "r", "e")
        await d.shows("/regenerate")
        assert "ask for the last reply again" in d.text
        d.matches("completion")
        await d.pilot.press("down", "tab")
        assert prompt.text == "/resume"
        prompt.text = "/kv s"
        await d.pilot.pause()
        await d.pilot.press("tab")
        assert prompt.text == "/kv small"
        prompt.text = f"/file {tmp_path}/no"
        await d.pilot.pause()
        await d.pilot.press("tab")
        assert prompt.text == f"/file {tmp_path}/notes.txt"
        prompt.text = ""
        await d.until(lambda: not d.screen.query_one("#completions").display)

    drive(script, tmp_path)


def test_a_document_is_read_with_a_bar_and_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("The budget is 5.")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type(f"/file {path}")
        await d.until(lambda: isinstance(d.engine.requests[-1], Read))
        reading = d.engine.read
        assert reading.turns[-1].text == "Document:\nThe budget is 5.\n\n"
        assert reading.name == "plan.txt"  # it may come from the document cache
        await d.emit(Prefill(reading.request, 512, 2048, 0))
        await d.shows("reading plan.txt")
        d.matches("reading_a_document")
        await d.emit(Prefill(reading.request, 2048, 2048, 0))
        await d.until(lambda: "reading plan.txt" not in d.text)
        await d.said("What is the budget?", "5.")
        assert d.engine.reply.turns[-1].text == (
            "Document:\nThe budget is 5.\n\nWhat is the budget?"
        )
        assert "[plan.txt] What is the budget?" in d.text
        await d.type("/summarize")
        await d.until(lambda: d.screen.chat.busy)
        assert d.engine.reply.turns[-1].text == "Summarize the document."
        d.engine.say("It is 5.")
        await d.until(lambda: not d.screen.chat.busy)
        await d.type(f"/file {path}")
        await d.until(lambda: d.engine.read is not reading)
        assert d.engine.read.name == ""  # what was said before does not go to the disk
        await d.emit(Noted("plan.txt is not kept"))
        await d.shows("plan.txt is not kept")

    drive(script, tmp_path)


def test_stopping_a_document_takes_it_out_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("text")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.shows("/file PATH")
        await d.pilot.press("escape")  # nothing runs: nothing happens
        assert d.engine.stopped == []
        number = d.engine.read.request
        assert number

    with pytest.raises(IndexError):
        drive(script, tmp_path)

    async def stop(d: Driver) -> None:
        await d.loaded()
        await d.until(lambda: d.screen.chat.reading)
        number = d.engine.read.request
        await d.pilot.press("escape")
        assert d.engine.stopped == [number]
        await d.emit(Stopped(number, "prefill", 0))
        await d.shows("not in context")
        await d.type("hello")
        assert d.engine.reply.turns[-1].text == "hello"

    drive(stop, tmp_path, options=Options(files=(str(path),)))


def test_changing_the_compression(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/kv small")
        assert d.engine.requests[-1] == Recode("leankv:k3v3")
        await d.emit(Recoded("leankv:k3v3", "cpu", 5, False, 900_000, 700_000))
        await d.shows("re-encoded, 900.00 kB -> 700.00 kB")
        assert "leankv:k3v3" in d.text.splitlines()[-2]
        await d.emit(Recoded("none", "none", 0, True, 900_000, 0))
        await d.shows("read again with your next message")
        await d.type("/kv k5v4")
        await d.shows("k_bits=5 is not supported")

    drive(script, tmp_path)


def test_compact_replaces_what_came_before(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/compact")
        await d.shows("nothing to summarize")
        await d.said("My name is Ada.", "Hello Ada.")
        await d.type("/compact")
        assert d.engine.reply.turns[-1].text.startswith("Summarize our conversation")
        d.engine.say("The user is Ada.")
        await d.until(lambda: not d.screen.chat.busy)
        await d.shows("Summary of the conversation")
        await d.said("Who am I?", "Ada.")
        (turn,) = d.engine.reply.turns
        assert turn.text == ("Summary of our conversation so far:\nThe user is Ada.\n\nWho am I?")

    drive(script, tmp_path)


def test_the_other_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/system Be brief.")
        await d.type("/set temperature 0.5")
        await d.shows("temperature is now 0.5")
        await d.type("/set temperature hot")
        await d.shows("not a number: hot")
        await d.said("first", "one")
        assert d.engine.reply.turns[0].text == "Be brief."
        assert d.engine.reply.temperature == 0.5
        await d.said("second", "two")
        copied: list[str] = []
        monkeypatch.setattr(d.app, "copy_to_clipboard", copied.append)
        await d.type("/copy")
        await d.type("/copy 2")
        assert copied == ["two", "one"]
        await d.type("/rename A title")
        await d.shows("leankv-chat · A title")
        await d.type(f"/export {tmp_path}/chat.md")
        text = (tmp_path / "chat.md").read_text()
        assert text.startswith("# A title\n")
        assert "## You\n\nsecond\n\n## Model\n\ntwo" in text
        await d.emit(SNAPSHOT)
        await d.type("/stats")
        await d.shows("5 of 5 layers compressed")
        await d.type("/model qwen3-8b")
        assert d.engine.requests[-1] == Load("mlx-community/Qwen3-8B-4bit", "leankv:k4v4", 0)
        await d.type("/nosuch")
        await d.shows("There is no command /nosuch")
        await d.type("/regenerate")
        assert [turn.text for turn in d.engine.reply.turns[1:]] == ["first", "one", "second"]
        await d.type("/clear")
        assert d.engine.requests[-1] == Forget()
        assert "second" not in d.text
        await d.type("/quit")

    drive(script, tmp_path)
