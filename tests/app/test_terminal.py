"""The real command in a real pseudo-terminal, with the demo model and with recordings."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.app.harness import LOADED, SNAPSHOT  # isort: skip

from leankv_app import main
from leankv_app.paths import paths
from leankv_app.sample import QUESTIONS, SAMPLE
from leankv_mlx.engine.events import Done, Text
from leankv_mlx.engine.record import dumped

COMMAND = [sys.executable, "-c", "from leankv_app.main import main; main()"]
ROOT = Path(__file__).parents[2]


pyte = pytest.importorskip("pyte")


class Terminal:
    """A process in a pty and the screen that it draws."""

    def __init__(self, arguments: list[str], home: Path, columns: int = 110, rows: int = 32):
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.master = master
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,  # textual draws there
            cwd=ROOT,
            env=os.environ | {"LEANKV_HOME": str(home), "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"{pattern} not found on\n{self.text}"
            self.read()
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.killpg(self.process.pid, signal.SIGWINCH)

    def leave(self) -> str:
        """Quit with Ctrl+Q; what is on the terminal afterwards."""
        self.type("\x11")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.read():
            pass
        assert self.process.wait(10) == 0
        os.close(self.master)
        return self.text

    def read(self) -> bool:
        """Draw what has come; False at the end."""
        if select.select([self.master], [], [], 0.1)[0]:
            try:
                self._stream.feed(os.read(self.master, 65536))
            except OSError:  # the process has gone
                return False
        return self.process.poll() is None


def document(folder: Path) -> Path:
    fact = "The access code of the Oslo archive is 48213."
    rooms = [f"The rooms of the Lima hotel on floor {i} are quiet at night." for i in range(70)]
    path = folder / "report.txt"
    path.write_text(" ".join([*rooms[:40], fact, *rooms[40:]]))
    return path


def test_the_demo_model_answers_from_a_document(tmp_path: Path) -> None:
    terminal = Terminal(["--file", str(document(tmp_path))], tmp_path / "home")
    terminal.until(r"demo model · leankv:k4v4")
    terminal.until(r"report\.txt: [\d,]+ characters")
    terminal.type("What is the access code of the Oslo archive?\r")
    terminal.until(r"The access code of the Oslo archive is 48213\.")
    ratio = terminal.until(r"(\d+\.\d\d)x smaller[^│]*│\s*$|│ (\d+\.\d\d)x smaller")
    assert float(ratio[1] or ratio[2]) >= 3
    terminal.resize(20, 5)
    terminal.resize(80, 24)
    terminal.until(r"(\d+\.\d\d)x smaller · ")  # narrow: the memory is in the status line
    terminal.until(r"is 48213\.")
    assert "--resume 1" in terminal.leave()


def test_the_demo_model_answers_from_its_sample(tmp_path: Path) -> None:
    subject = QUESTIONS[0].removeprefix("Tell me the ").rstrip(".")
    text = " ".join(SAMPLE.read_text(encoding="utf-8").split())
    fact = re.search(rf"The {subject} is [^.]+\.", text)
    assert fact
    terminal = Terminal([], tmp_path / "home")
    terminal.until("It cannot chat")
    terminal.type("/demo\r")
    terminal.until(re.escape(QUESTIONS[0]))
    terminal.type(f"{QUESTIONS[0]}\r")
    terminal.until(re.escape(fact[0]))
    terminal.leave()


def test_a_recording_is_played_without_a_model(tmp_path: Path) -> None:
    recording = tmp_path / "events.jsonl"
    events = [LOADED, Text(1, "This was ", 1), Text(1, "recorded.", 2), SNAPSHOT,
              Done(1, "stop", 9, 0, 2, 0.1, 0.1)]  # fmt: skip
    recording.write_text("\n".join(dumped(event, i / 10) for i, event in enumerate(events)))
    written = tmp_path / "again.jsonl"
    arguments = ["--replay", str(recording), "--record", str(written)]
    terminal = Terminal(arguments, tmp_path / "home", 80, 24)
    terminal.until("demo model")
    terminal.type("hello\r")
    terminal.until(r"This was recorded\.")
    terminal.until(r"3\.10x smaller")
    terminal.leave()
    names = [json.loads(line)["event"] for line in written.read_text().splitlines()]
    assert names == ["Loaded", "Text", "Text", "Snapshot", "Done"]


def test_help_imports_neither_mlx_nor_textual() -> None:
    code = (
        "import sys; from leankv_app.main import run; code = run(['--help']); "
        "print(code, sorted({'mlx', 'mlx.core', 'mlx_lm', 'textual'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.splitlines()[-1] == "0 []"
    for flag in ("--model", "--kv", "--system", "--file", "--memory-budget", "--resume",
                 "--record", "--replay", "--paths"):  # fmt: skip
        assert flag in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kv", "k5v4"], "k_bits=5 is not supported"),
        (["--memory-budget", "lots"], "'lots' is not a size"),
        (["--file", "/no/such"], "there is no file /no/such"),
        (["--replay", "/no/such"], "cannot read the recording"),
        (["--resume", "x"], "--resume x is not a session"),
        (["--nosuch"], "see leankv-chat --help"),
        ([], "needs a terminal"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("leankv-chat: error: ")
    assert text in err
    assert err.count("\n") == 1


def test_paths(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LEANKV_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/x/data")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x/config")
    assert main.run(["--paths"]) == 0
    out = capfd.readouterr().out
    assert "/x/data/leankv/chats.db" in out
    assert "/x/config/leankv/settings.json" in out
    monkeypatch.setenv("LEANKV_HOME", "/home/of/leankv")
    assert paths().database == Path("/home/of/leankv/chats.db")


def test_the_first_paint_needs_little_but_the_terminal() -> None:
    from leankv_app.bench import _first_paint

    # `leankv bench --ui` measures how long it takes; these are what would make it long.
    slow = {"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "pypdfium2", "markitdown"}
    *_, packages = _first_paint()
    assert "textual" in packages
    assert not packages & slow


@pytest.mark.slow
def test_the_ui_is_fast() -> None:
    from leankv_app.bench import measure_ui

    found = measure_ui()
    assert not found["first_paint_imports_mlx"]
    assert found["first_paint_cpu_seconds"] < 0.5  # other programs do not count
    assert found["frames_per_second"] >= 20
    assert found["slowdown"] < 0.2
