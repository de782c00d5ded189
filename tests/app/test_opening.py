"""A document that takes long, or cannot be read, holds up neither the chat nor its end."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leankv_mlx.documents.urls import Fetched
from leankv_mlx.engine.requests import Read
from tests.app.harness import Driver, drive


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/long.pdf"


def test_esc_stops_a_document_while_it_is_got_and_parsed(silent: str, tmp_path: Path) -> None:
    """Esc works while a document is read, and what is waited for is said."""

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type(f"/file {silent}")
        await d.shows("opening long.pdf")
        await d.pilot.press("escape")
        await d.shows("Stopped; the document is not in context", seconds=5)
        await d.until(lambda: "opening" not in d.text)
        await d.said("hello", "Hi.")
        assert not any(isinstance(request, Read) for request in d.engine.requests)

    drive(script, tmp_path)


def test_leaving_does_not_wait_for_a_document(silent: str, tmp_path: Path) -> None:
    """Ctrl+Q ends at once, whatever is read."""
    left = 0.0

    async def script(d: Driver) -> None:
        nonlocal left
        await d.loaded()
        await d.type(f"/file {silent}")
        await d.pilot.pause(0.5)
        left = time.monotonic()
        await d.pilot.press("ctrl+q")

    drive(script, tmp_path)
    assert time.monotonic() - left < 8  # the server would be waited for 15 seconds


def test_a_new_chat_does_not_get_a_document_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent to the wrong place: a document that arrives when another chat has begun."""
    cleared = threading.Event()

    def late(*args: object) -> Fetched:
        cleared.wait(10)
        return Fetched("a.txt", b"The budget is 5.", "text/plain", "")

    monkeypatch.setattr("leankv_mlx.documents.readers.fetch", late)

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/file http://localhost/a.txt")
        await d.pilot.pause(0.1)
        await d.type("/clear")
        cleared.set()
        await d.until(lambda: not d.screen.workers)
        assert not d.screen.chat.documents

    drive(script, tmp_path)


def test_names_that_are_no_names_do_not_end_the_chat(tmp_path: Path) -> None:
    """One document ends the chat: a user that does not exist, a file name that is not UTF-8."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    try:
        Path(path).write_text("The budget is 5.")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.screen.slash.file("~nouser-at-all/x")
        await d.shows("There is no file")
        await d.pilot.press("escape")
        await d.screen.slash.file(path)
        await d.shows("caf\ufffd.txt: 16 characters")
        await d.said("What is the budget?", "5.")

    drive(script, tmp_path)


def test_an_error_that_nobody_thought_of_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document ends the chat: any exception of a reader."""

    def broken(*args: object, **known: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("leankv_mlx.documents.readers.fetch", broken)

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.type("/file http://localhost/a.txt")
        await d.shows("ZeroDivisionError: by zero (the traceback is in")
        await d.pilot.press("escape")

    drive(script, tmp_path)
