"""A damaged database is put aside as it is, and what can be read in it goes to a new one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leankv_app.store.database import BESIDE, connect, described, number, text
from leankv_mlx.atomic import free_name

ROLES = ("user", "assistant", "summary")
_STATUS = ("done", "stopped", "interrupted", "failed")
_MOST_UNREADABLE = 1000
"""Rows in a row that may be unreadable, more than a page holds."""
_MOST_SECONDS = 20.0
"""For all of them: pages that lead to one another can be many without being much."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recovered:
    """Where the damaged database is now, and how much of it is in the new one."""

    aside: Path
    sessions: int
    messages: int

    @property
    def line(self) -> str:
        """For the user."""
        if not self.messages:
            return f"The damaged database is now {self.aside}; no message in it could be read."
        return (
            f"The damaged database is now {self.aside}; what could be read is in the new one: "
            f"messages {self.messages}, chats {self.sessions}."
        )


def begin_anew(path: Path) -> Recovered:
    """Put a database aside, and make a new one of what can still be read.

    Raises:
        OSError: it cannot be renamed.
        StoreError: the new one cannot be written.
    """
    aside = free_name(path)
    # The database last: without it, nothing takes what stands beside it for its own.
    for suffix in (*BESIDE, ""):
        if os.path.lexists(f"{path}{suffix}"):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    sessions, messages = _readable(aside)
    known = {row["id"] for row in sessions}
    lost = max(known, default=0) + 1  # of messages that do not say to which chat they belong
    messages = [_message(row, lost) for row in messages]
    sessions = [_session(row) for row in sessions]
    for session in dict.fromkeys(row["session"] for row in messages):
        if session not in known:
            sessions.append(_session({"id": session, "title": "(recovered)"}))
    with closing(connect(path)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(_SESSION, sessions)
            db.executemany(_MESSAGE, messages)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise described(error, path) from error
    return Recovered(aside, len(sessions), len(messages))


def _readable(aside: Path) -> tuple[list[Row], list[Row]]:
    """Rows of sessions and messages; of a copy, because reading a database may change its file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy.db")
        try:
            for suffix in ("", "-wal"):
                if os.path.isfile(f"{aside}{suffix}"):
                    shutil.copyfile(f"{aside}{suffix}", f"{copy}{suffix}")
        except OSError:  # what is no file, or not ours to read, has nothing for us
            return [], []
        with closing(sqlite3.connect(copy)) as db:
            db.row_factory = sqlite3.Row
            db.text_factory = text
            end = time.monotonic() + _MOST_SECONDS
            db.set_progress_handler(lambda: time.monotonic() > end, 10_000)
            return list(_rows(db, "sessions")), list(_rows(db, "messages"))


def _rows(db: sqlite3.Connection, table: str) -> Iterator[Row]:
    """Rows in the order of their ids; those that cannot be read are left out."""
    first, unreadable = 1, 0
    query = f"SELECT rowid AS id, * FROM {table} WHERE rowid >= ? ORDER BY rowid"
    while unreadable < _MOST_UNREADABLE and first < 2**63:
        try:
            for row in db.execute(query, (first,)):
                if row["id"] >= first:  # a damaged page leads back to where one has been
                    yield {name.lower(): row[name] for name in row.keys()}  # noqa: SIM118
                    first, unreadable = row["id"] + 1, 0
            return
        except sqlite3.Error:
            first, unreadable = first + 1, unreadable + 1


def _session(row: Row) -> Row:
    now = time.time()
    texts = {name: text(row.get(name)) for name in ("title", "model", "kv", "system")}
    times = {name: number(row.get(name), now) for name in ("created", "updated")}
    return {"id": row["id"], **texts, **times}


def _message(row: Row, lost: int) -> Row:
    session, role, status = row.get("session"), row.get("role"), row.get("status")
    return {
        "id": row["id"],
        "session": session if type(session) is int else lost,
        "role": role if role in ROLES else "user",
        "text": text(row.get("text")),
        "shown": text(row.get("shown")),
        "status": status if status in _STATUS else "interrupted",
        "created": number(row.get("created"), time.time()),
    }


_SESSION = """
    INSERT OR IGNORE INTO sessions (id, title, model, kv, system, created, updated)
    VALUES (:id, :title, :model, :kv, :system, :created, :updated)
"""
_MESSAGE = """
    INSERT OR IGNORE INTO messages (id, session, role, text, shown, status, created)
    VALUES (:id, :session, :role, :text, :shown, :status, :created)
"""
