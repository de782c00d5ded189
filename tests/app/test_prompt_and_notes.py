"""Small faults of the chat's own words: said of the wrong thing, in the way, or cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.harness import SNAPSHOT, Driver, drive, places  # isort: skip

from leankv_app.format import counted, sentence, shortened
from leankv_app.options import Options
from leankv_app.settings import load
from leankv_app.store import Message, Store, export
from leankv_mlx.engine.events import Done, Failed, Prefill, Stopped, Text


@pytest.mark.parametrize("leave", ["/clear", "ctrl+n", "/resume 1"])
def test_what_was_left_says_nothing(tmp_path: Path, leave: str) -> None:
    """An event of a reply or document that was left belongs to nobody."""
    path = tmp_path / "plan.txt"
    path.write_text("The plan.")
    store = Store(places(tmp_path).database)
    store.add(store.create("", "leankv", ""), Message("user", "an old one"))
    store.close()

    async def script(d: Driver) -> None:
        async def go() -> None:
            await (d.type(leave) if leave.startswith("/") else d.pilot.press(leave))
            await d.pilot.pause()

        await d.loaded()
        for end in (Stopped(0, "decode", 4), Failed(0, "reply", "no memory is left")):
            await d.type("tell me a story")
            d.engine.say("Once upon", done=False)
            await d.shows("Once upon")
            number = d.engine.reply.request
            await go()
            await d.emit(type(end)(number, *list_of(end)[1:]))
            assert "document" not in d.text.replace("put a document in context", "")
            assert "no memory" not in d.text
            await d.type("/clear")
        await d.type(f"/file {path}")
        await d.until(lambda: d.screen.chat.reading)
        number = d.engine.read.request
        await go()
        await d.emit(Prefill(number, 9, 99, 0), Stopped(number, "prefill", 0))
        assert "not in context" not in d.text
        assert "reading" not in d.text

    drive(script, tmp_path)


def list_of(event: Stopped | Failed) -> list[object]:
    return [getattr(event, name) for name in event.__slots__]


def test_a_failure_of_something_else_leaves_documents_alone(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("The plan.")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type(f"/file {path}")
        await d.until(lambda: d.screen.chat.reading)
        await d.emit(Done(d.engine.read.request, "stop", 9, 0, 0, 0.1, 0.0))
        await d.emit(Failed(0, "kv", "no such thing"))
        await d.pilot.press("escape")
        await d.type("What is it?")
        assert d.engine.reply.turns[-1].text == "Document:\nThe plan.\n\nWhat is it?"
        await d.emit(Failed(d.engine.reply.request, "reply", "x"))
        await d.pilot.press("escape")
        await d.type(f"/file {path}")
        await d.until(lambda: d.screen.chat.reading)
        await d.emit(Failed(d.engine.read.request, "reply", "plan.txt is too long"))
        await d.shows("─ Document ─")
        await d.shows("plan.txt is too long")

    drive(script, tmp_path)


def test_a_new_chat_has_nothing_to_jump_to(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.said("count", *(f"line {i}\n\n" for i in range(60)))
        await d.pilot.press("pageup")
        await d.until(lambda: d.screen.query_one("#chip").display)
        for _ in range(3):
            await d.type("/clear")
            await d.pilot.pause(0.2)
            d.screen.conversation.scrolled()
            assert not d.screen.query_one("#chip").display
        await d.said("hello", "Hi.")
        assert not d.screen.query_one("#chip").display

    drive(script, tmp_path)


def test_an_answer_to_a_command_is_in_view(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.said("count", *(f"line {i}\n\n" for i in range(60)))
        await d.pilot.press("pageup", "pageup")
        await d.type("/file /nosuch.txt")
        await d.shows("There is no file /nosuch.txt.")
        assert len(d.app.screen_stack) == 2

    drive(script, tmp_path)


def test_up_goes_on_through_commands(tmp_path: Path) -> None:
    """A recalled command offers no completions, which would keep Up and Down to themselves."""

    async def script(d: Driver) -> None:
        await d.loaded()
        for line in ("first", "/set temperature 0.5", "/stats", "/model", "last"):
            d.screen.prompt.remember(line)
        d.screen.prompt.text = "draft"
        for line in ("last", "/model", "/stats", "/set temperature 0.5", "first"):
            await d.pilot.press("up")
            await d.pilot.pause()
            assert d.screen.prompt.text == line
            assert not d.screen.query_one("#completions").display
        for line in ("/set temperature 0.5", "/stats", "/model", "last", "draft"):
            await d.pilot.press("down")
            await d.pilot.pause()
            assert d.screen.prompt.text == line
        await d.pilot.press("up", "up", "backspace")
        await d.until(lambda: d.screen.query_one("#completions").display)

    drive(script, tmp_path)


def test_settings_are_listed_and_say_what_they_may_be(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/set")
        for line in ("theme is textual-dark (", "model is (none) (any text", "kv is leankv (",
                     "temperature is 0.0 (0 to 5)", "top_p is 1.0 (0.01 to 1)",
                     "max_tokens is 1024 (1 to 1,000,000)", "panel is on (on, off)"):  # fmt: skip
            await d.shows(line)
        await d.type("/set temperature")
        await d.shows("temperature is 0.0 (0 to 5)")
        for line, answer in (
            ("theme nosuch", "There is no theme nosuch; there are"),
            ("panel maybe", "panel is on or off"),
            ("kv k5v4", "k_bits=5 is not supported"),
            ("nosuch 1", "There is no setting nosuch; there are theme"),
            ("__class__ x", "There is no setting __class__"),
            ("nosuch", "There is no setting nosuch"),
            ("temperature 9", "temperature is from 0.0 to 5.0"),
        ):
            before = d.app.settings
            await d.type(f"/set {line}")
            await d.shows(answer)
            assert d.app.settings == before
        await d.type("/set theme nord")
        assert d.app.theme == "nord"
        assert d.screen.panel.display
        await d.type("/set panel off")
        await d.until(lambda: not d.screen.panel.display)
        await d.pilot.press("ctrl+b")
        await d.until(lambda: d.screen.panel.display)
        await d.type("/set panel off")
        await d.until(lambda: not d.screen.panel.display)
        await d.type("/set panel on")
        await d.until(lambda: d.screen.panel.display)
        await d.type("/set kv small")
        await d.shows("kv is now small, from the next start on; /kv changes this chat.")
        await d.type("/set system Be brief.")
        await d.type('/set system ""')
        assert d.app.settings.system == ""
        d.screen.prompt.text = "/set theme nor"
        await d.pilot.pause()
        await d.pilot.press("tab")
        assert d.screen.prompt.text == "/set theme nord"

    drive(script, tmp_path, (130, 50))
    assert load(places(tmp_path).settings)[0].theme == "nord"


def test_the_panel_follows_the_settings_screen(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.pilot.press("f3")
        await d.shows("Memory panel")
        d.app.screen.query_one("#set-panel").value = False
        await d.pilot.press("ctrl+s")
        await d.until(lambda: not d.screen.panel.display)

    drive(script, tmp_path, (130, 50))


def test_names_of_files_keep_their_letters(tmp_path: Path) -> None:
    assert sentence("there is no file x.") == "There is no file x."
    assert sentence("no model is loaded; choose one.") == "No model is loaded; choose one."
    for text in ("plan.txt is empty.", "x/y is gated", "report is empty.", "k_bits=5 is", ""):
        assert sentence(text) == text
    path = tmp_path / "empty.txt"
    path.write_text("")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type(f"/file {path}")
        await d.shows("empty.txt is empty.")
        assert len(d.app.screen_stack) == 2
        await d.emit(Failed(0, "load", "llama.gguf is damaged"))
        await d.shows("llama.gguf is damaged")

    drive(script, tmp_path)


@pytest.mark.parametrize("size", [(80, 24), (130, 36), (40, 12)])
def test_a_toast_leaves_the_prompt_alone(tmp_path: Path, size: tuple[int, int]) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        typed = "x" * (d.screen.prompt.content_size.width - 1)
        d.screen.prompt.text = typed
        for text in ("one", "two", "three"):
            d.app.notify(text)
        await d.shows("three")
        assert typed in d.text

    drive(script, tmp_path, size)


def test_titles_are_cut_behind_a_word(tmp_path: Path) -> None:
    question = "Which of the lighthouses of the northern coast was the first with electric light?"
    title = "Which of the lighthouses of the northern coast was the…"
    assert shortened(question, 60) == title
    assert shortened("a  b\nc", 60) == "a b c"
    assert shortened("x" * 60, 60) == "x" * 60
    assert shortened("x" * 61, 60) == "x" * 59 + "…"
    assert shortened("长" * 80, 60) == "长" * 59 + "…"
    assert shortened("see " + "x" * 80, 60) == "see " + "x" * 55 + "…"
    for text in (question, "a, " * 40, "长 " * 70):
        assert len(shortened(text, 60)) <= 60
    assert export.file_name(question).endswith("-which-of-the-lighthouses-of-the.md")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.said(question, "That of Hirtshals.")
        await d.shows(f"leankv-chat · {title}")
        await d.type("/rename two\nlines")
        await d.shows("leankv-chat · two lines")

    drive(script, tmp_path)

    store = Store(places(tmp_path).database)
    store.add(store.create("", "leankv", ""), Message("user", question))
    assert store.sessions()[0].title == title


def test_one_of_a_thing_has_no_plural(tmp_path: Path) -> None:
    assert [counted(n, "token") for n in (0, 1, 2, 2000)] == [
        "0 tokens", "1 token", "2 tokens", "2,000 tokens",
    ]  # fmt: skip
    path = tmp_path / "a.txt"
    path.write_text("x")
    store = Store(places(tmp_path).database)
    store.add(store.create("", "leankv", ""), Message("user", "alone"))
    store.close()

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type(f"/file {path}")
        await d.shows("a.txt: 1 character;")
        d.screen.done = Done(1, "stop", 1, 0, 1, 0.1, 0.1)
        await d.emit(SNAPSHOT)
        await d.type("/stats")
        await d.shows("last reply: 1 token in 0.1 s; 1 prompt token read")
        await d.pilot.press("ctrl+s")
        await d.shows("· 1 message")
        assert "1 messages" not in d.text
        await d.pilot.press("d")
        await d.shows("with 1 message?")

    drive(script, tmp_path, (130, 36), Options())


def test_a_reply_that_is_left_leaves_no_task(tmp_path: Path) -> None:
    """The stream of a reply ends with its widget."""

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("hello")
        await d.emit(Text(d.engine.reply.request, "Once upon", 1))
        await d.shows("Once upon")
        view = d.screen.query_one("ReplyMessage")
        assert view._stream is not None
        await d.type("/clear")
        await d.until(lambda: view._stream is None)

    drive(script, tmp_path)
