"""The database: nothing is lost to a kill, another instance, a full or read-only disk, damage."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app.harness import Driver, drive, places  # isort: skip

from leankv_app import settings as configuration
from leankv_app.options import Options
from leankv_app.store import Message, Store, StoreError, database, export

KILLED = """
import os, sys
from pathlib import Path
from leankv_app.store import Message, Store

store = Store(Path(sys.argv[1]))
session = store.create("", "leankv", "")
store.add(session, Message("user", "Tell me about lighthouses."))
reply = Message("assistant", "", status="running")
store.add(session, reply)
reply.text = "A lighthouse is a tower"
store.update(reply)
reply.text += " that was said within the last second"
os._exit(9)
"""


def filled(path: Path) -> Store:
    store = Store(path)
    session = store.create("", "leankv", "")
    store.add(session, Message("user", "hello"))
    store.add(session, Message("assistant", "Hi there."))
    return store


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    filled(path).close()
    store = Store(path)
    (info,) = store.sessions()
    assert (info.title, info.messages, info.busy) == ("hello", 2, False)
    assert [m.text for m in store.messages(info.id)] == ["hello", "Hi there."]
    assert store.find("last") == store.find(str(info.id)) == info
    store.change(info.id, title="renamed")
    assert store.sessions()[0].title == "renamed"
    store.delete(info.id)
    assert store.sessions() == []
    rows = sqlite3.connect(path).execute("SELECT count(*) FROM messages").fetchone()
    assert rows == (0,)  # foreign keys


def test_a_kill_in_the_middle_of_a_reply_loses_only_the_last_second(tmp_path: Path) -> None:
    path = places(tmp_path).database
    ran = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ran.returncode == 9

    async def script(d: Driver) -> None:
        await d.shows("A lighthouse is a tower")
        await d.shows("(interrupted: the app ended")
        assert "Tell me about lighthouses." in d.text
        d.matches("resumed_after_a_kill")
        await d.loaded()
        await d.said("go on", "It guides ships.")
        assert [turn.role for turn in d.engine.reply.turns] == ["user", "assistant", "user"]

    app = drive(script, tmp_path, options=Options(resume="last"))
    assert app.last_words == ["saved; continue with: leankv-chat --resume 1"]


def test_a_reply_is_checkpointed_every_second(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("hello")
        d.engine.say("half a reply", done=False)
        await d.shows("half a reply")
        other = Store(places(tmp_path).database)
        await d.until(lambda: other.messages(1)[-1].text == "half a reply", 3)
        assert other.messages(1)[-1].status == "running"
        assert other.sessions()[0].busy is False  # the same process
        other.close()

    drive(script, tmp_path)
    assert Store(places(tmp_path).database).messages(1)[-1].status == "stopped"


def test_two_instances_share_a_database(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    first, second = Store(path), Store(path)
    one, other = first.create("", "", ""), second.create("", "", "")
    for i in range(20):
        first.add(one, Message("user", f"a{i}"))
        second.add(other, Message("user", f"b{i}"))
    assert len(first.messages(one)) == len(first.messages(other)) == 20
    first.close()
    second.close()


def test_a_session_that_is_open_elsewhere_is_said(tmp_path: Path) -> None:
    path = places(tmp_path).database
    filled(path).close()
    other = sqlite3.connect(path)
    other.execute("UPDATE sessions SET pid = ?", (os.getppid(),))
    other.commit()
    other.close()

    async def script(d: Driver) -> None:
        await d.shows("also open in another window")
        await d.shows("Hi there.")

    drive(script, tmp_path, options=Options(resume="1"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (sqlite3.OperationalError("database or disk is full"), "The disk is full"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "read-only"),
        (sqlite3.OperationalError("database is locked"), "in use by another program"),
    ],
)
def test_a_write_that_fails_keeps_the_chat_in_memory(
    tmp_path: Path, error: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        await d.said("first", "one")
        broken = d.screen.chat.store

        def fail(*args: object) -> None:
            raise database.described(error, broken.path) from error

        monkeypatch.setattr(broken, "add", fail)
        await d.said("second", "two")
        await d.shows("Chats are not saved")
        assert text in " ".join(d.text.split())
        await d.pilot.press("enter")
        await d.said("third", "three")
        chat = d.screen.chat
        assert not chat.store.saved
        texts = [message.text for message in chat.store.messages(chat.session)]
        assert texts == ["first", "one", "second", "two", "third", "three"]

    drive(script, tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")

    async def script(d: Driver) -> None:
        await d.shows("Chats are not saved")
        await d.pilot.press("enter")
        await d.loaded()
        await d.said("hello", "Hi.")

    app = drive(script, tmp_path)
    assert app.last_words == []


def test_a_damaged_database_can_be_set_aside(tmp_path: Path) -> None:
    path = places(tmp_path).database
    path.parent.mkdir()
    path.write_bytes(b"this is no database, but it may be precious " * 50)
    content = path.read_bytes()

    async def script(d: Driver) -> None:
        await d.shows("is damaged")
        await d.pilot.click("#yes")
        await d.until(lambda: d.screen.chat.store.saved)
        await d.loaded()
        await d.said("hello", "Hi.")

    drive(script, tmp_path)
    (aside,) = path.parent.glob("chats.db.broken-*")
    assert aside.read_bytes() == content
    assert Store(path).sessions()[0].title == "hello"


def test_a_database_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    filled(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="later version"):
        Store(path)


def test_an_old_database_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    connection = sqlite3.connect(path)
    connection.executescript(database.MIGRATIONS[0])
    connection.execute("INSERT INTO sessions (title, created, updated) VALUES ('old', 1, 1)")
    connection.execute(
        "INSERT INTO messages (session, role, text, created) VALUES (1, 'user', 'hello', 1)"
    )
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    store = Store(path)
    assert store.sessions()[0].title == "old"
    version = store._connection.execute("PRAGMA user_version").fetchone()[0]
    assert version == len(database.MIGRATIONS)


def test_settings_survive_and_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    kept = configuration.Settings(theme="nord", temperature=0.7)
    assert configuration.save(path, kept) == ""
    assert configuration.load(path) == (kept, "")
    for text in ("{", "[]", '{"temperature": "hot"}', '{"max_tokens": 0}', '{"panel": 3}'):
        path.write_text(text)
        settings, problem = configuration.load(path)
        assert settings == configuration.Settings()
        assert "damaged" in problem
        (aside,) = (x for x in tmp_path.glob("settings.json.broken-*") if str(x) in problem)
        assert aside.read_text() == text
        aside.rename(tmp_path / "seen")
    path.write_text(json.dumps({"theme": "nord", "of a later version": 1}))
    assert configuration.load(path)[0].theme == "nord"
    assert "could not be saved" in configuration.save(tmp_path / "settings.json" / "x", kept)


def test_damaged_settings_are_said(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")

    async def script(d: Driver) -> None:
        await d.shows("settings file is damaged")
        await d.pilot.press("enter")
        await d.until(lambda: len(d.app.screen_stack) == 2)

    drive(script, tmp_path)


@pytest.mark.parametrize(
    ("content", "text"), [(None, "There is no file"), (b"\0\1\2" * 99, "is not a text")]
)
def test_a_document_that_cannot_be_read_is_said(
    content: bytes | None, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "document.txt"
    if content is not None:
        path.write_bytes(content)

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type(f"/file {path}")
        await d.shows(text)
        await d.pilot.press("escape")
        await d.said("hello", "Hi.")

    drive(script, tmp_path)


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    name = export.file_name("What? A title/with: signs")
    assert name.endswith("-what-a-title-with-signs.md")
    first = export.write(tmp_path / "x" / name, "one")
    second = export.write(tmp_path / "x" / name, "two")
    assert first != second
    assert (first.read_text(), second.read_text()) == ("one", "two")
