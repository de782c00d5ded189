"""Pickers, settings, help, the palette, and terminals of every size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.app.harness import LOADED, Driver, drive, places  # isort: skip

from leankv_app.format import model_name
from leankv_app.options import Options
from leankv_app.screens import models
from leankv_app.store import Message, Store
from leankv_mlx.engine import Engine
from leankv_mlx.engine.catalogue import catalogue
from leankv_mlx.engine.events import Loading
from leankv_mlx.engine.requests import Load


def saved(folder: Path) -> None:
    store = Store(places(folder).database)
    for title in ("about lighthouses", "about ships"):
        session = store.create("", "leankv", "")
        store.add(session, Message("user", title))
        store.add(session, Message("assistant", f"All {title}."))
    store.close()


def test_sessions_are_opened_renamed_and_deleted(tmp_path: Path) -> None:
    saved(tmp_path)

    async def script(d: Driver) -> None:
        await d.pilot.press("ctrl+s")
        await d.shows("about lighthouses")
        await d.pilot.press("r")
        await d.shows("Rename")
        await d.pilot.press("end", "space", *"now", "enter")
        await d.shows("about ships now")
        await d.pilot.press("d")
        await d.shows("Delete “about ships now”")
        await d.pilot.click("#yes")
        await d.until(lambda: "about ships" not in d.text)
        await d.pilot.press("down", "enter")
        await d.shows("All about lighthouses.")
        await d.shows("leankv-chat · about lighthouses")

    drive(script, tmp_path)
    assert [info.title for info in Store(places(tmp_path).database).sessions()] == [
        "about lighthouses"
    ]


def test_models_are_listed_with_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "cached_models", lambda: {"mlx-community/Qwen3-0.6B-4bit", "a/b"})
    monkeypatch.setattr("leankv_app.screens.models.memory_size", lambda: 16 * 10**9)

    async def script(d: Driver) -> None:
        await d.emit(LOADED)
        await d.shows("leankv-chat")  # the picture has the header, too
        await d.pilot.press("ctrl+o")
        await d.shows("qwen3-0.6b")
        lines = {line.split()[1]: line for line in d.text.splitlines() if "qwen3-0.6b" in line}
        assert "here" in next(iter(lines.values()))
        assert "does not fit" in next(x for x in d.text.splitlines() if "llama-3.3-70b" in x)
        d.matches("models")
        await d.pilot.press("down", "enter")
        assert d.engine.requests[-1] == Load(
            "mlx-community/Qwen2.5-1.5B-Instruct-4bit", "leankv:quality", 0
        )
        await d.pilot.press("ctrl+o")
        await d.shows("qwen3-0.6b")
        await d.pilot.click("#other")
        await d.pilot.press(*"my/model", "enter")
        assert d.engine.requests[-1].model == "my/model"

    drive(script, tmp_path)


def test_models_to_chat_with_come_first_and_the_demo_model_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "cached_models", lambda: {"a/b"})
    rows = models.rows_for(16 * 10**9)
    offered = [entry.repo for entry in catalogue() if entry.offered]
    assert len(offered) == 3
    assert [choice.model for choice, _, _ in rows[:3]] == offered
    assert [choice.model for choice, _, _ in rows[-2:]] == ["", "a/b"]
    assert len(rows) == len(catalogue()) + 1


def test_a_gguf_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    """In every place that takes a model; what is in the file is no matter of the app."""
    file = tmp_path / "A Model.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    (tmp_path / "A Model.txt").write_text("no model")

    async def script(d: Driver) -> None:
        assert d.engine.requests[0] == Load(str(file), "leankv:k4v4", 0)
        await d.emit(Loading(str(file)))
        await d.shows("loading A Model.Q4_1.gguf …")
        await d.emit(replace(LOADED, model=str(file), name="A Model.Q4_1.gguf"))
        await d.shows("A Model.Q4_1.gguf · leankv:k4v4")
        assert "To chat, load a model" not in d.text
        d.screen.prompt.text = f"/model {tmp_path}/A"
        await d.pilot.pause()
        await d.pilot.press("tab")
        assert d.screen.prompt.text == f"/model {file}"
        await d.type(f"/model {file}")
        await d.type("/model ~/b.gguf")
        await d.pilot.press("ctrl+o")
        await d.shows("qwen3-0.6b")
        await d.pilot.click("#other")
        await d.pilot.press(*"c.gguf", "enter")
        assert [request.model for request in d.engine.requests[1:]] == [
            str(file), "~/b.gguf", "c.gguf",
        ]  # fmt: skip

    drive(script, tmp_path, options=Options(model=str(file)))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/name", "owner/name"),
        ("/models/a b.gguf", "a b.gguf"),
        ("~/a.gguf", "a.gguf"),
        ("./a.gguf", "a.gguf"),
        ("a.gguf", "a.gguf"),
        ("/models/folder/", "folder"),
        ("", ""),
    ],
)
def test_names_of_models(model: str, name: str) -> None:
    assert model_name(model) == name


def test_settings_are_checked_saved_and_used(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.pilot.press("f3")
        await d.shows("System prompt")
        field = d.app.screen.query_one("#set-temperature")
        field.value = "hot"
        await d.pilot.press("ctrl+s")
        await d.shows("temperature is not a number: hot")
        field.value = "0.7"
        d.app.screen.query_one("#set-theme").value = "textual-light"
        await d.pilot.press("ctrl+s")
        await d.until(lambda: len(d.app.screen_stack) == 2)
        assert d.app.theme == "textual-light"
        assert d.screen.chat.settings.temperature == 0.7

    drive(script, tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert (kept["theme"], kept["temperature"]) == ("textual-light", 0.7)


def test_keys_of_the_chat_do_nothing_under_a_dialog(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.emit(LOADED)
        await d.said("hello", "Hi.")
        await d.pilot.press("f1", "ctrl+n", "ctrl+r", "ctrl+b", "escape")
        await d.shows("Hi.")
        assert not d.screen.chat.busy
        assert d.screen.panel.display

    drive(script, tmp_path, (110, 32))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    """With the real engine: the dialog says it, and another model can be loaded."""

    async def script(d: Driver) -> None:
        await d.shows("is not a model: it has no", 60)
        assert "no model; Ctrl+O" in d.text
        await d.pilot.press("enter")
        await d.type("hello")
        await d.shows("No model is loaded", 60)
        await d.pilot.press("enter")
        await d.type("/model demo")
        await d.shows("demo model · leankv:k4v4", 60)

    drive(script, tmp_path, options=Options(model=str(tmp_path)), make_engine=Engine)


def test_help_and_palette(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.pilot.press("f1")
        await d.shows("Shift+Enter")
        await d.pilot.press("escape", "ctrl+p")
        await d.pilot.press(*"memory")
        await d.shows("Memory panel")
        await d.pilot.press("escape")

    drive(script, tmp_path)


@pytest.mark.parametrize("size", [(20, 5), (40, 10), (1, 1)])
def test_a_terminal_that_becomes_tiny(tmp_path: Path, size: tuple[int, int]) -> None:
    async def script(d: Driver) -> None:
        await d.emit(LOADED)
        await d.said("hello", "Hi **there**.")
        await d.pilot.resize_terminal(*size)
        await d.pilot.pause(0.1)
        if size == (20, 5):
            await d.pilot.press(*"typed")
            assert "typed" in d.text
        await d.pilot.press("f1", "escape", "ctrl+s", "escape")
        await d.pilot.resize_terminal(80, 24)
        await d.shows("Hi there.")

    drive(script, tmp_path)


def test_nothing_that_users_write_is_read_as_markup(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.emit(LOADED)
        await d.said("[bold]x[/] [/nosuch] [", "[red]y[/] and [link](http://a.b)")
        await d.shows("[bold]x[/] [/nosuch] [")
        await d.type("/rename [/] [bold")
        await d.shows("leankv-chat · [/] [bold")
        await d.pilot.press("ctrl+s")
        await d.shows("[/] [bold")
        await d.pilot.press("escape")
        await d.type("/[x]")
        await d.shows("There is no command /[x]")

    drive(script, tmp_path)
