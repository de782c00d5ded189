"""Sessions and messages. Every change is committed at once."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leankv_app.format import shortened
from leankv_app.store.database import StoreError, connect, described, number, text

TITLE_LENGTH = 60


@dataclass(slots=True)
class Message:
    """One message.

    Attributes:
        role: "user", "assistant", or "summary" (what stands for everything before it).
        text: what the model reads, or said.
        shown: what the screen shows instead, "" for the text.
        status: "done", "running", "stopped", "interrupted" or "failed".
        id: its row, 0 before it is saved.
    """

    role: str
    text: str
    shown: str = ""
    status: str = "done"
    id: int = 0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session as lists show it; `busy` if another running instance has it open."""

    id: int
    title: str
    model: str
    kv: str
    system: str
    updated: float
    messages: int
    busy: bool


class Store:
    """The chats of one user.

    Args:
        path: the database; None keeps everything in memory.

    Raises:
        StoreError: here and in every method: the database cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._connection = connect(path)
        try:
            self._interrupt_the_dead()
        except StoreError:
            self._connection.close()
            raise

    @property
    def saved(self) -> bool:
        """Whether chats outlive the process."""
        return self.path is not None

    def close(self) -> None:
        """Close the database."""
        with suppress(sqlite3.Error):  # only a hint for other instances
            self._connection.execute("UPDATE sessions SET pid = 0 WHERE pid = ?", (os.getpid(),))
        self._connection.close()

    # Sessions

    def create(self, model: str, kv: str, system: str) -> int:
        """A new, empty session."""
        now = time.time()
        with self._writing() as db:
            made = db.execute(
                "INSERT INTO sessions (model, kv, system, created, updated, pid) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (model, kv, system, now, now, os.getpid()),
            )
        return int(made.lastrowid or 0)

    def sessions(self, limit: int = 200) -> list[SessionInfo]:
        """Sessions that have messages, the latest first."""
        return [_info(row) for row in self._rows(_SESSIONS + " LIMIT ?", (limit,))]

    def find(self, name: str) -> SessionInfo | None:
        """A session by its number, or the "last" one."""
        found = self.sessions()
        if name == "last":
            return found[0] if found else None
        return next((info for info in found if str(info.id) == name), None)

    def claim(self, session: int) -> None:
        """Note that this process has a session open."""
        with self._writing() as db:
            db.execute("UPDATE sessions SET pid = ? WHERE id = ?", (os.getpid(), session))

    def change(self, session: int, **values: str) -> None:
        """Set title, model, kv or system."""
        names = [name for name in values if name in ("title", "model", "kv", "system")]
        with self._writing() as db:
            for name in names:
                db.execute(f"UPDATE sessions SET {name} = ? WHERE id = ?", (values[name], session))

    def delete(self, session: int) -> None:
        """Remove a session and its messages."""
        with self._writing() as db:
            db.execute("DELETE FROM sessions WHERE id = ?", (session,))

    def _interrupt_the_dead(self) -> None:
        """Mark replies of processes that died while they ran."""
        with self._writing() as db:
            for row in db.execute("SELECT DISTINCT pid FROM messages WHERE status = 'running'"):
                if not _alive(row["pid"]):
                    db.execute(
                        "UPDATE messages SET status = 'interrupted' "
                        "WHERE status = 'running' AND pid IS ?",
                        (row["pid"],),
                    )

    # Messages

    def messages(self, session: int) -> list[Message]:
        """Messages in order."""
        rows = self._rows("SELECT * FROM messages WHERE session = ? ORDER BY id", (session,))
        return [
            Message(row["role"], text(row["text"]), text(row["shown"]), row["status"], row["id"])
            for row in rows
        ]

    def add(self, session: int, message: Message) -> None:
        """Append a message; its id is set. The first user's message gives the session a title."""
        now = time.time()
        title = shortened(message.shown or message.text, TITLE_LENGTH)
        with self._writing() as db:
            made = db.execute(
                "INSERT INTO messages (session, role, text, shown, status, pid, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (session, message.role, message.text, message.shown, message.status,
                 os.getpid(), now),
            )  # fmt: skip
            db.execute(
                "UPDATE sessions SET updated = ?, title = CASE WHEN title = '' AND ? = 'user' "
                "THEN ? ELSE title END WHERE id = ?",
                (now, message.role, title, session),
            )
        message.id = int(made.lastrowid or 0)

    def update(self, message: Message) -> None:
        """Write a message's text and status again: a checkpoint, or its end."""
        with self._writing() as db:
            db.execute(
                "UPDATE messages SET text = ?, status = ? WHERE id = ?",
                (message.text, message.status, message.id),
            )

    def remove(self, messages: Sequence[Message]) -> None:
        """Take messages out, for a reply that is asked for again."""
        with self._writing() as db:
            db.executemany("DELETE FROM messages WHERE id = ?", [(m.id,) for m in messages])

    def _rows(self, query: str, values: Sequence[Any]) -> list[sqlite3.Row]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise described(error, self.path) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise described(error, self.path) from error


_SESSIONS = """
    SELECT s.*, count(m.id) AS messages FROM sessions s JOIN messages m ON m.session = s.id
    GROUP BY s.id ORDER BY s.updated DESC, s.id DESC
"""


def _info(row: sqlite3.Row) -> SessionInfo:
    pid = row["pid"]
    busy = bool(pid) and pid != os.getpid() and _alive(pid)
    return SessionInfo(
        row["id"],
        text(row["title"]) or "(no title)",
        text(row["model"]),
        text(row["kv"]),
        text(row["system"]),
        number(row["updated"]),
        row["messages"],
        busy,
    )


def _alive(pid: Any) -> bool:
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = ["Message", "SessionInfo", "Store", "StoreError"]
