"""Damaged files at the start: the chat starts, says what it put aside, and loses what it must."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.app.harness import Driver, FakeEngine, drive, places  # isort: skip

from leankv_app import settings as configuration
from leankv_app.factory import make_app
from leankv_app.options import Options
from leankv_app.paths import Paths
from leankv_app.store import Message, Store
from leankv_app.store.recovery import begin_anew
from leankv_mlx.profiles import profiles, save_profile, user_profiles

Damage = Callable[[random.Random, bytes], bytes]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return places(tmp_path)


def written(paths: Paths) -> dict[Path, bytes]:
    """A user's files: settings, profiles and twelve chats, one of which has long messages."""
    configuration.save(paths.settings, configuration.Settings(kv="leankv:mine", system="Be brief."))
    for name in ("mine", "other", "third"):
        save_profile(user_profiles(), name, "k4v3,window=96", f"About {name}.")
    store = Store(paths.database)
    for chat in range(12):
        session = store.create("", "leankv", "")
        for turn in range(10):
            length = 20_000 if chat == 5 else 40
            store.add(session, Message("user", f"question {chat}.{turn} " + "why " * (length // 4)))
            store.add(session, Message("assistant", f"answer {chat}.{turn} naïve"))
    store.close()
    files = (paths.settings, user_profiles(), paths.database)
    return {path: path.read_bytes() for path in files}


def flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: random.Random, data: bytes) -> bytes:
    start, n = rng.randrange(len(data)), rng.choice([4, 100, 4096, 20_000])
    junk = rng.choice([bytes(n), b"\xff" * n, rng.randbytes(n)])
    return data[:start] + junk[: len(data) - start] + data[start + n :]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def shifted(rng: random.Random, data: bytes) -> bytes:
    start, n = rng.randrange(len(data)), rng.choice([1, 16, 4096])
    return data[:start] + rng.choice([rng.randbytes(n), b""]) + data[start + n // 2 :]


def a_page_lost(rng: random.Random, data: bytes) -> bytes:
    """A block of the disk that came back as another one."""
    pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    pages[rng.randrange(len(pages))] = rng.choice([*pages, bytes(4096)])[: len(pages[-1])]
    return b"".join(pages)


NONSENSE = [
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 400, b"9" * 5000, b"null", b"\0" * 500, b"\xff\xfe\0",
    b'{"temperature": 1' + b"0" * 400 + b"}", b'{"max_tokens": 1' + b"0" * 5000 + b"}",
    b'{"temperature": NaN}', b'{"top_p": [1]}', b'{"system": "\\ud800"}', b'{"kv": "k99v99"}',
    b'{"kv": 7}', b"profiles = [1]", b"[profiles.x]\nkv = {a = 1}", b"[profiles]\nx = 3",
    b"x = " + b"[" * 50_000, b"[profiles.mine]\nkv = 'nosuch=1'", b"[profiles.lean]\nkv = '\0'",
]  # fmt: skip


def nonsense(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(NONSENSE)


KINDS: list[Damage] = [flipped, overwritten, cut, shifted, a_page_lost, nonsense]


def start(paths: Paths, originals: dict[Path, bytes], seed: int) -> tuple[int, int]:
    """Damage all files, do what the app does before its first paint, and what its dialog does.
    Returns how many messages were in the database and how many are, if it was put aside."""
    rng = random.Random(seed)
    for path, data in originals.items():
        path.write_bytes(rng.choice(KINDS)(rng, data))
    damaged = {path: path.read_bytes() for path in originals}
    app = make_app(Options(), paths, FakeEngine)
    for path, title in ((paths.settings, "Settings"), (user_profiles(), "Profiles")):
        line = app._problems[title]
        assert "\n" not in line and len(line) < 2 * len(str(path)) + 300
        if path.exists():
            assert line == "" and path.read_bytes() == damaged[path]
        else:
            (aside,) = path.parent.glob(f"{path.name}.broken-*")
            assert str(aside) in line and aside.read_bytes() == damaged[path]
            aside.unlink()
    assert "lean" in profiles()
    assert app.chat.kv.startswith("leankv")
    line = app._store_problem
    assert "\n" not in line and bool(line) != app.chat.store.saved
    before = after = 0
    if "damaged" in line:
        now = paths.database.read_bytes()
        recovered = begin_anew(paths.database)
        assert recovered.aside.read_bytes() == now and str(recovered.aside) in recovered.line
        store = Store(paths.database)
        before, after = 240, recovered.messages
        assert recovered.messages == len(texts(store)) <= 240
        store.close()
    elif not line:
        assert len(texts(app.chat.store)) == 240
    else:
        assert str(paths.database) in line
    app.chat.store.close()
    for file in paths.database.parent.iterdir():
        file.unlink()
    return before, after


def texts(store: Store) -> list[str]:
    """Everything that can be opened, as the app opens it."""
    found = []
    for info in store.sessions():
        for message in store.messages(info.id):
            assert isinstance(message.text + message.shown + info.title + info.kv, str)
            assert message.role in ("user", "assistant", "summary")
            found.append(message.text)
    return found


def rounds(paths: Paths, seeds: range) -> None:
    originals = written(paths)
    before = after = 0
    for seed in seeds:
        try:
            lost, kept = start(paths, originals, seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        before, after = before + lost, after + kept
    assert after > before // 3 > 0  # a page with the list of tables takes all with it


def test_thirty_of_each_damaged_at_random(home: Paths) -> None:
    """Damaged settings, profiles and databases of any kind: one line each, and put aside."""
    rounds(home, range(30))


@pytest.mark.slow
def test_a_thousand_of_each_damaged_at_random(home: Paths) -> None:
    rounds(home, range(1000))


STARTS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 15))]


@pytest.mark.parametrize("seed", STARTS)
def test_the_chat_starts_with_damaged_files_and_says_so(seed: int, home: Paths) -> None:
    """The same on the screen: dialogs that name what was put aside, and a chat that works."""
    originals = written(home)
    rng = random.Random(seed)
    for path, data in originals.items():
        path.write_bytes(rng.choice(KINDS)(rng, data))

    async def script(d: Driver) -> None:
        await d.pilot.pause(0.2)
        while len(d.app.screen_stack) > 2:
            dialogs = len(d.app.screen_stack)
            assert any(word in d.text for word in ("damaged", "not a file of", "later", "unknown",
                                                   "cannot be", "not understood"))  # fmt: skip
            await d.pilot.press("enter")
            await d.until(lambda n=dialogs: len(d.app.screen_stack) < n)
        await d.loaded()
        await d.said("hello", "Hi there.")
        await d.shows("Hi there.")

    drive(script, home.database.parent.parent)


def test_a_damaged_database_goes_on_with_what_can_be_read(home: Paths) -> None:
    """All chats gone although only a page was damaged; and nobody said where the old file is."""
    data = bytearray(written(home)[home.database])
    data[-4096:] = bytes(4096)
    home.database.write_bytes(data)

    async def script(d: Driver) -> None:
        await d.shows("is damaged")
        await d.pilot.click("#yes")
        await d.shows("what could be read is in the new one: messages 2")
        await d.loaded()
        await d.said("hello", "Hi there.")

    drive(script, home.database.parent.parent)
    store = Store(home.database)
    found = texts(store)
    assert 200 < len(found) < 242 and "hello" in found
    store.close()


# What damage at random does not find


def changed(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            db.execute(statement)
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA user_version = -5",
        "PRAGMA user_version = 33554434",
        "PRAGMA user_version = 0",
        "DROP TABLE messages",
        "ALTER TABLE messages RENAME COLUMN shown TO other",
        "UPDATE sqlite_master SET sql = 'CREATE TABLE messages (' WHERE name = 'messages'",
    ],
)
def test_a_database_with_another_schema_is_damaged(statement: str, home: Paths) -> None:
    """IndexError at the start, or a chat that is not saved with no way out."""
    written(home)
    changed(home.database, statement)
    app = make_app(Options(), home, FakeEngine)
    assert app._store_problem == f"{home.database} is damaged."
    recovered = begin_anew(home.database)
    assert recovered.sessions == (0 if "sqlite_master" in statement else 12)
    assert len(texts(Store(home.database))) == recovered.messages


def test_rows_of_any_type_are_shown(home: Paths) -> None:
    """TypeError in the list of chats: the columns of a damaged row hold anything."""
    written(home)
    changed(
        home.database,
        "UPDATE sessions SET title = x'ff41', kv = x'00', updated = 'x', pid = 'y' WHERE id = 1",
        "UPDATE sessions SET updated = 9e999, pid = 4611686018427387904 WHERE id = 2",
        "UPDATE messages SET text = x'c328', shown = 5, status = 'running', pid = x'00' "
        "WHERE id = 3",
        "UPDATE messages SET text = CAST(x'41ff42' AS TEXT) WHERE id = 4",
    )
    store = Store(home.database)
    assert len(texts(store)) == 240
    (message,) = (m for m in store.messages(1) if m.id == 4)
    assert message.text == "A\ufffdB"
    store.close()


def test_messages_without_their_chat_are_recovered(home: Paths) -> None:
    written(home)
    changed(
        home.database,
        "DELETE FROM sessions WHERE id = 3",
        "UPDATE messages SET session = 'x' WHERE id = 1",
        "PRAGMA user_version = -1",
    )
    recovered = begin_anew(home.database)
    store = Store(home.database)
    assert len(texts(store)) == recovered.messages == 240
    assert {info.title for info in store.sessions() if info.title.startswith("(")} == {
        "(recovered)"
    }
    store.close()


def test_what_is_written_but_not_yet_in_the_database_is_recovered(home: Paths) -> None:
    """The write-ahead log of an app that was killed goes with its database."""
    written(home)
    store = Store(home.database)
    store.add(1, Message("user", "the last words"))
    copy = {s: Path(f"{home.database}{s}").read_bytes() for s in ("", "-wal")}
    store.close()
    for suffix, data in copy.items():
        Path(f"{home.database}{suffix}").write_bytes(data)
    recovered = begin_anew(home.database)
    assert recovered.messages == 241 and "the last words" in texts(Store(home.database))
    assert Path(f"{recovered.aside}-wal").read_bytes() == copy["-wal"]


def test_settings_that_are_no_file_are_put_aside(home: Paths) -> None:
    """Never overwritten, and never waited for: a folder, a pipe, a file that is no text."""

    kinds: list[Callable[[Path], Any]] = [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.write_bytes(b"\xff\xfe{}"),
    ]
    for number, make in enumerate(kinds, 1):
        make(home.settings)
        settings, line = configuration.load(home.settings)
        assert settings == configuration.Settings() and not home.settings.exists()
        asides = list(home.settings.parent.glob("settings.json.broken-*"))
        assert len(asides) == number and any(f"it is now {aside}." in line for aside in asides)


def test_a_setting_that_names_no_profile_any_more_is_said(home: Paths) -> None:
    home.settings.write_text(json.dumps({"kv": "leankv:gone"}))
    app = make_app(Options(), home, FakeEngine)
    assert "'gone'" in app._problems["Compression"] and app.chat.kv == "leankv"
    app.chat.store.close()


def test_a_folder_in_place_of_the_database_is_one_line(home: Paths) -> None:
    home.database.mkdir(parents=True)
    app = make_app(Options(), home, FakeEngine)
    assert app._store_problem == f"{home.database} is no file; move it away."
