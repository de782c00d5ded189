"""Opening the database: WAL, foreign keys, and migrations by `user_version`."""

from __future__ import annotations

import sqlite3
from pathlib import Path

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


class StoreError(Exception):
    """Chats cannot be read or saved; one line that says why and what to do."""


def connect(path: Path | None) -> sqlite3.Connection:
    """An up-to-date database; None for one in memory.

    Raises:
        StoreError: it cannot be opened, is damaged, or belongs to a later version.
    """
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _migrate(connection, path)
        # A disk that cannot be written is noticed now, not with the first message.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except (sqlite3.Error, OSError) as error:
        raise described(error, path) from error
    return connection


def _migrate(connection: sqlite3.Connection, path: Path | None) -> None:
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise StoreError(f"{path} was written by a later version of leankv-chat; update it.")
    if version == len(MIGRATIONS):
        if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("file is damaged")
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another instance may have been quicker.
        for number in range(_version(connection), len(MIGRATIONS)):
            for statement in filter(str.strip, MIGRATIONS[number].split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def described(error: Exception, path: Path | None) -> StoreError:
    """An error of SQLite or the system as one line."""
    text = str(error).lower()
    if "locked" in text or "busy" in text:
        return StoreError(f"{path} is in use by another program for too long.")
    if "full" in text or "no space" in text:
        return StoreError(f"The disk is full; {path} cannot grow.")
    if "readonly" in text or "read-only" in text or "permission" in text:
        return StoreError(f"{path} cannot be written: it or its folder is read-only.")
    if "not a database" in text or "malformed" in text or "damaged" in text:
        return StoreError(f"{path} is damaged.")
    return StoreError(f"{path} cannot be used ({error}).")
