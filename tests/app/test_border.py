"""Text from outside never drives the terminal: the same strings, from every place they come from,
in a real pseudo-terminal. The fault was of a kind: each border let through what it did not make."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import socketserver
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("leankv_app")

from leankv_app.store import Message, Store
from leankv_mlx.engine.events import Done, Event, Failed, Noted, Text
from leankv_mlx.engine.record import dumped
from leankv_mlx.terminal import json_text, printable
from tests.app.harness import LOADED, SNAPSHOT

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "\x1b]52;c;aGk=\x07", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1b[?1049l", "\x1b[2J",
    "\x1b[31;7m", "\x1b[3;4H", "\x1bc", "\x1b7", "\x1bPq#0\x1b\\", "\x1b_Gf=1\x1b\\",
    "\x1b^x\x1b\\", "\x1bXs\x1b\\", "\x1b[6n", "\x1b[5i", "\x1b[200~", "\x9b31;7m",
    "\x9d52;c;aGk=\x9c", "\x90q\x9c", "\x07", "\b\b\b", "\x0e", "\x7f", "[red]x[/red]",
    "[@click=app.quit]x[/]",
)  # fmt: skip
MARKED = [f"m{i:02}{text}n{i:02}" for i, text in enumerate(HOSTILE)]
"""Each between two marks, so that what arrives can be told from what the program itself sends."""
TEXT = "\n\n".join(MARKED)
NAME = " ".join(MARKED)


class Screen:
    """All that a process sends to its terminal."""

    def __init__(self, code: str, arguments: list[str], home: Path, columns: int = 200) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 150, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env=os.environ | {"LEANKV_HOME": str(home), "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(slave)
        self.sent = b""

    def until(self, pattern: bytes, count: int = 1, seconds: float = 120) -> None:
        """Wait for so many different texts that the pattern matches."""
        end = time.monotonic() + seconds
        while len(set(re.findall(pattern, self.sent))) < count:
            self.check(end)
            self.read()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def all(self, seconds: float = 60) -> bytes:
        """Everything, to the end of the process."""
        end = time.monotonic() + seconds
        while self.read():
            self.check(end)
        self.process.wait(10)
        os.close(self.master)
        return self.sent

    def check(self, end: float) -> None:
        """Past its end a process is not waited for, and does not stay."""
        if time.monotonic() > end:
            self.process.kill()
            raise AssertionError(self.sent[-3000:])

    def read(self) -> bool:
        if select.select([self.master], [], [], 0.1)[0]:
            try:
                self.sent += os.read(self.master, 65536)
            except OSError:  # the process has gone
                return False
            return True
        return self.process.poll() is None


def none_arrives(sent: bytes, least: int = len(HOSTILE)) -> None:
    """So many marks were shown, and behind none of them came what would drive the terminal."""
    shown = [i for i in range(len(HOSTILE)) if f"m{i:02}".encode() in sent]
    assert len(shown) >= least, sent[-3000:]
    arrived = [HOSTILE[i] for i in shown if f"m{i:02}{HOSTILE[i][0]}".encode() in sent
               and printable(HOSTILE[i]) != HOSTILE[i]]  # fmt: skip
    assert not arrived
    for i in shown:  # markup is text
        if printable(HOSTILE[i]) == HOSTILE[i]:
            assert MARKED[i].encode() in sent


CHAT = "from leankv_app.main import main; main()"
COMMAND = "from leankv_mlx.cli import main; main()"
SAYS = f"""
from types import SimpleNamespace
from leankv_mlx.blas import bind; bind()
import mlx_lm, sys
def stream_generate(*args, **options):
    yield SimpleNamespace(
        text={TEXT!r}, token=1, finish_reason="stop", prompt_tokens=9, prompt_tps=9,
        generation_tokens=9, generation_tps=9, peak_memory=1)
mlx_lm.stream_generate = sys.modules["mlx_lm.generate"].stream_generate = stream_generate
"""
"""A model that says all of them."""


def chat(
    events: list[Event], folder: Path, send: str = "hello\r", *arguments: str,
    least: int = len(HOSTILE),
) -> bytes:  # fmt: skip
    """What the chat draws when the engine tells it these events: so many of the marks at least."""
    recording = folder / "events.jsonl"
    recording.write_text("\n".join(dumped(event, 0) for event in events))
    screen = Screen(CHAT, ["--replay", str(recording), *arguments], folder / "home")
    screen.until(b"leankv:k4v4|m00")
    if send:
        screen.type(send)
    screen.until(rb"m(?:[01]\d|2[0-4])", least)
    screen.type("\x11")
    return screen.all()


END = Done(1, "stop", 9, 0, 1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("events", "least"),
    [
        pytest.param([LOADED, Text(1, TEXT, 1), SNAPSHOT, END], 25, id="reply"),
        pytest.param([LOADED, Failed(1, "reply", f"because {NAME}")], 25, id="error"),
        pytest.param([LOADED, *map(Noted, MARKED)], 25, id="note"),
        pytest.param([replace(LOADED, name=NAME), Noted("x")], 3, id="name of a model"),
    ],
)
def test_in_the_chat(events: list[Event], least: int, tmp_path: Path) -> None:
    none_arrives(chat(events, tmp_path, least=least), least)


def test_in_saved_chats(tmp_path: Path) -> None:
    store = Store(tmp_path / "home" / "chats.db")
    for text in MARKED:
        session = store.create("", "leankv:k4v4", "")
        store.change(session, title=text)
        store.add(session, Message("user", "hello"))
    store.add(session, Message("user", TEXT))
    store.close()
    resumed = chat([LOADED], tmp_path, "", "--resume", "last")
    none_arrives(resumed)
    none_arrives(chat([LOADED], tmp_path, "\x13"))  # the list of sessions


def command(folder: Path, *arguments: str, code: str = COMMAND) -> bytes:
    return Screen(code, list(arguments), folder / "home").all()


def test_in_names_and_arguments(tmp_path: Path) -> None:
    none_arrives(command(tmp_path, "ask", NAME, "what?"))
    none_arrives(command(tmp_path, "generate", "--kv", NAME))
    none_arrives(command(tmp_path, "summarize", "--model", f"/{NAME}", __file__))


@contextmanager
def reason(text: str) -> Iterator[str]:
    """The address of a server that refuses with this phrase."""

    class Refuse(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(f"HTTP/1.1 404 {text}\r\n\r\n".encode("latin-1"))

    with socketserver.TCPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/x"
        server.shutdown()


def test_in_what_a_server_answers(tmp_path: Path) -> None:
    with reason(NAME) as address:
        sent = command(tmp_path, "ask", address, "what?")
    assert b"404" in sent  # the words of the standard stand for the server's
    none_arrives(sent, 0)


def test_in_replies_of_commands(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("A report.")
    files = [tmp_path / f"{text.replace('/', '')}.txt" for text in MARKED]
    for file in files:
        file.write_text(f"A text of its own: {file.name[:3]}.")
    ask = ("ask", str(tmp_path / "report.txt"), "what?")
    none_arrives(command(tmp_path, *ask, code=SAYS + COMMAND))
    none_arrives(command(tmp_path, "generate", "--prompt", "x", code=SAYS + COMMAND))
    sent = command(tmp_path, "summarize", *map(str, files[:23]), code=SAYS + COMMAND)
    none_arrives(sent)
    none_arrives(command(tmp_path, "cache", "list"), 23)  # with the names of the documents


def test_json_says_all_and_sends_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("A report.")
    ask = ("ask", str(tmp_path / "report.txt"), "what?", "--json")
    sent = command(tmp_path, *ask, code=SAYS + COMMAND)
    sent = sent[sent.index(b"{") :]  # behind the bar on stderr
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]", sent)
    assert json.loads(sent)["answer"] == TEXT


def test_what_is_printable() -> None:
    assert printable("a\tb\r\nc\x1b[0m d\u0301 \U0001f600") == "a\tb\nc[0m d\u0301 \U0001f600"
    assert printable("caf\udce9.txt") == "caf\ufffd.txt"  # a file name that is not UTF-8
    assert json.loads(json_text([NAME, "\udce9"])) == [NAME, "\udce9"]
