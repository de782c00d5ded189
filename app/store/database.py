"""Opening the database: WAL, foreign keys, and migrations by `user_version`."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

BUSY_SECONDS = 5.0
"""How long a write waits for another instance."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,
        title TEXT NOT NULL DEFAULT '',
        model TEXT NOT NULL DEFAULT '',
        kv TEXT NOT NULL DEFAULT '',
        system TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL,
        updated REAL NOT NULL
    );
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY,
        session INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        role TEXT NOT NULL CHECK (role IN ('user', 'assistant', 'summary')),
        text TEXT NOT NULL,
        shown TEXT NOT NULL DEFAULT '',
        status TEXT NOT NULL DEFAULT 'done',
        pid INTEGER NOT NULL DEFAULT 0,
        created REAL NOT NULL
    );
    CREATE INDEX messages_of_session ON messages(session, id);
    """,
    "ALTER TABLE sessions ADD COLUMN pid INTEGER NOT NULL DEFAULT 0;",
)
"""Entry n brings a database from user_version n to n + 1; entries are never changed."""


_NO_VERSION = 1000
"""No version will be so high: the number is damaged."""
_COLUMNS = (
    "SELECT id, title, model, kv, system, created, updated, pid FROM sessions",
    "SELECT id, session, role, text, shown, status, pid, created FROM messages",
)
_SIGNS_OF_DAMAGE = (
    "not a database", "malformed", "damaged", "no such table", "no such column", "already exists",
    "unsupported file format", "constraint failed", "datatype mismatch", "short read",
)  # fmt: skip
BESIDE = ("-wal", "-shm")
"""Endings of the files that belong to a database."""


class StoreError(Exception):
    """Chats cannot be read or saved; one line that says why and what to do."""


def connect(path: Path | None) -> sqlite3.Connection:
    """An up-to-date database; None for one in memory.

    Raises:
        StoreError: it cannot be opened, is damaged, or belongs to a later version.
    """
    connection = None
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.text_factory = text
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _migrate(connection, path)
        # A disk that cannot be written is noticed now, not with the first message.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error | OSError):
            raise described(error, path) from error
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path | None) -> None:
    version = _version(connection)
    if len(MIGRATIONS) < version < _NO_VERSION:
        raise StoreError(f"{path} was written by a later version of leankv-chat; update it.")
    if not 0 <= version < _NO_VERSION:
        raise sqlite3.DatabaseError("file is damaged")
    # Indexes are checked too: an entry that is lost there hides a message.
    if version and connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
        raise sqlite3.DatabaseError("file is damaged")
    if version < len(MIGRATIONS):
        _bring_up_to_date(connection)
    for query in _COLUMNS:
        connection.execute(f"{query} LIMIT 0")


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another instance may have been quicker.
        for done in range(_version(connection), len(MIGRATIONS)):
            for statement in filter(str.strip, MIGRATIONS[done].split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {done + 1}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def described(error: Exception, path: Path | None) -> StoreError:
    """An error of SQLite or the system as one line."""
    said = str(error).lower()
    if "locked" in said or "busy" in said:
        return StoreError(f"{path} is in use by another program for too long.")
    if "full" in said or "no space" in said:
        return StoreError(f"The disk is full; {path} cannot grow.")
    if "readonly" in said or "read-only" in said or "permission" in said:
        return StoreError(f"{path} cannot be written: it or its folder is read-only.")
    if any(sign in said for sign in _SIGNS_OF_DAMAGE):
        return StoreError(f"{path} is damaged.")
    if path is not None and path.exists() and not path.is_file():
        return StoreError(f"{path} is no file; move it away.")
    return StoreError(f"{path} cannot be used ({' '.join(str(error).split())[:200]}).")


def text(value: Any) -> str:
    """What a column of text holds, whatever it is: the rows of a damaged database have any type,
    and one bad byte must not hide a message."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "" if value is None else str(value)


def number(value: Any, otherwise: float = 0) -> float:
    """The same for a number; `otherwise` where it is none that a clock or a process could have."""
    return value if isinstance(value, int | float) and 0 <= value < 2**32 else otherwise
