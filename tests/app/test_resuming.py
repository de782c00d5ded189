"""A chat and the model it is with: what a session had, what was asked for, what is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.app.harness import LOADED, Driver, drive, places  # isort: skip

from leankv_app.options import Options
from leankv_app.store import Message, SessionInfo, Store
from leankv_mlx.engine.events import Downloading, Failed, Loading, Prefill, Recoded, Stopped
from leankv_mlx.engine.requests import Load, Recode

B = replace(LOADED, model="owner/b", name="b", kv="leankv:k3v3")


def saved(folder: Path, model: str = "owner/b", kv: str = "leankv:k3v3", system: str = "") -> None:
    store = Store(places(folder).database)
    session = store.create(model, kv, system)
    store.add(session, Message("user", "about ships"))
    store.add(session, Message("assistant", "All about ships."))
    store.close()


def row(folder: Path, number: int = 0) -> SessionInfo:
    store = Store(places(folder).database)
    found = store.sessions()[number]
    store.close()
    return found


def loads(d: Driver) -> list[Load]:
    return [request for request in d.engine.requests if isinstance(request, Load)]


def test_a_session_goes_on_with_its_own_model_and_setting(tmp_path: Path) -> None:
    """Kind: resuming takes what happens to be loaded."""
    saved(tmp_path)

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/resume 1")
        assert loads(d)[-1] == Load("owner/b", "leankv:k3v3", 0)
        await d.shows("goes on with what it had: owner/b, leankv:k3v3")
        await d.shows("All about ships.")
        await d.type("more")  # while it loads
        assert d.engine.reply.model == "owner/b"
        await d.emit(B)
        d.engine.say("More.")
        await d.until(lambda: not d.screen.chat.busy)
        assert len(loads(d)) == 2

    drive(script, tmp_path)
    assert (row(tmp_path).model, row(tmp_path).kv) == ("owner/b", "leankv:k3v3")


def test_another_setting_alone_needs_no_load(tmp_path: Path) -> None:
    """Kind: resuming takes what happens to be loaded."""
    saved(tmp_path, model="")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/resume 1")
        assert d.engine.requests[-1] == Recode("leankv:k3v3")

    drive(script, tmp_path)


@pytest.mark.parametrize(
    ("options", "load"),
    [
        (Options(resume="1"), Load("owner/b", "leankv:k3v3", 0)),
        (Options(resume="1", kv="none"), Load("owner/b", "none", 0)),
        (Options(resume="1", model="qwen3-8b"), Load("mlx-community/Qwen3-8B-4bit", "leankv:k3v3")),
        (Options(resume="7"), Load("", "leankv:k4v4", 0)),
    ],
)
def test_one_load_at_the_start(tmp_path: Path, options: Options, load: Load) -> None:
    """Kind: resuming takes what happens to be loaded. What the command line says goes first."""
    saved(tmp_path)

    async def script(d: Driver) -> None:
        await d.until(lambda: loads(d))
        assert loads(d) == [load]

    drive(script, tmp_path, options=options)


def test_a_setting_that_is_not_known_any_more_and_no_system_prompt(tmp_path: Path) -> None:
    """Kind: resuming takes another setting than the session had."""
    saved(tmp_path, model="", kv="leankv:of=1999")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/resume 1")
        assert len(d.engine.requests) == 2  # the first load, and the empty cache
        await d.type("more")
        assert [turn.role for turn in d.engine.reply.turns] == ["user", "assistant", "user"]

    drive(script, tmp_path, options=Options(system="Be brief."))


def test_a_model_that_is_gone_leaves_the_session_readable(tmp_path: Path) -> None:
    """Kind: what fails must not overwrite what the session had."""
    saved(tmp_path, model="/gone")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/resume 1")
        await d.emit(Loading("/gone"), Failed(0, "load", "no model folder /gone."))
        await d.shows("No model folder /gone.")
        await d.pilot.press("enter")
        await d.shows("demo model with leankv:k4v4 answers what comes next.")
        await d.shows("All about ships.")
        assert row(tmp_path).model == "/gone"
        await d.type("more")
        assert d.engine.reply.model == ""

    drive(script, tmp_path)


def test_a_choice_of_model_is_kept_with_the_session(tmp_path: Path) -> None:
    """Kind: `/model` is not remembered."""

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.said("hello", "hi")
        await d.type("/model owner/b")
        await d.emit(replace(B, kv="leankv:k4v4"))
        assert row(tmp_path).model == "owner/b"
        await d.type("/kv k3v3")
        await d.emit(Recoded("leankv:k3v3", "cpu", 5, False, 2, 1))
        assert row(tmp_path).kv == "leankv:k3v3"

    drive(script, tmp_path)


def test_a_message_while_a_model_loads_is_for_that_model(tmp_path: Path) -> None:
    """Kind: a request and a load race; requests carry what they were made for."""

    async def script(d: Driver) -> None:
        await d.type("hello")  # before anything is loaded
        assert row(tmp_path).model == "owner/b"
        assert d.engine.reply.model == "owner/b"

    drive(script, tmp_path, options=Options(model="owner/b"))


def test_a_setting_that_is_chosen_while_a_model_loads_stays(tmp_path: Path) -> None:
    """Kind: a request and a load race; the event of the earlier one overwrote the later."""

    async def script(d: Driver) -> None:
        await d.type("/kv k3v3")
        await d.loaded()  # with the setting it was asked for with
        assert d.screen.chat.kv == "leankv:k3v3"
        await d.emit(Recoded("leankv:k3v3", "cpu", 5, False, 2, 1))
        await d.type("/model owner/c")
        assert loads(d)[-1].kv == "leankv:k3v3"
        await d.type("/resume")
        await d.pilot.press("escape")
        await d.emit(Failed(0, "load", "no such model"))
        await d.pilot.press("enter")
        assert (d.screen.chat.model, d.screen.chat.kv) == ("", "leankv:k3v3")
        await d.type("/kv k2v2")
        await d.emit(Failed(0, "kv", "this model does not go with it"))
        assert d.screen.chat.kv == "leankv:k3v3"

    drive(script, tmp_path)


def test_half_a_summary_stands_for_nothing(tmp_path: Path) -> None:
    """Kind: resuming loses what the session had: an interrupted /compact hid all before it."""
    saved(tmp_path, model="", kv="leankv:k4v4")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/resume 1")
        await d.type("/compact")
        d.engine.say("The user", done=False)
        await d.shows("The user")
        await d.type("/clear")
        await d.type("/resume 1")
        await d.type("more")
        assert d.engine.reply.turns[0].text == "about ships"

    drive(script, tmp_path)


def test_stopping_is_said_at_once(tmp_path: Path) -> None:
    """Kind: Esc seems to do nothing until the engine has looked."""

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("a long question")
        number = d.engine.reply.request
        await d.emit(Prefill(number, 32, 2048, 0))
        await d.pilot.press("escape")
        await d.shows("stopping …")
        await d.emit(Prefill(number, 64, 2048, 0))
        assert "stopping …" in d.text
        await d.emit(Stopped(number, "prefill", 0))
        assert "stopping …" not in d.text
        await d.type("/model owner/b")
        await d.pilot.press("escape")  # what is on the disk cannot be stopped
        assert "stopping …" not in d.text
        await d.emit(Downloading("owner/b", 1, 9))
        await d.pilot.press("escape")
        await d.shows("stopping …")
        assert d.engine.stopped[-1] == 0
        await d.emit(Stopped(0, "load", 0))
        await d.shows("demo model with leankv:k4v4 answers what comes next.")

    drive(script, tmp_path)
