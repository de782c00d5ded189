"""Whatever is typed or goes wrong, the chat goes on: one line, and the traceback in a log."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.app.harness import Driver, drive  # isort: skip

from leankv_app.commands import COMMANDS
from leankv_mlx.documents import readers
from leankv_mlx.faults import described, log_file

ODD = (
    "²", "٣", "Ⅷ", "½", "\x00", "\ud800", "caf\udce9.txt", "\u202e", "\x1b[31m", "\x9b", "🙂" * 9,
    "a" * 3000, "9" * 5000, "-1", "1e309", "nan", "~nouser/x", "~", "/", "..", "__class__ x",
    "temperature nan", "temperature ²", "max_tokens ٣", "max_tokens 1e3", "panel maybe",
    "theme \x00", "leankv:", "leankv:k4v4,,", "k²v²", "leankv:budget=nan", "0", "last", "[bold]x",
    "[/nope]", "{}", "%s", "\\", "'", "file:///\udcff", "http://[::1", "http://\x00/", "\t", "=",
)  # fmt: skip
LEFT_OUT = ("/quit", "/demo", "/help")


@pytest.fixture(autouse=True)
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_no_slash_command_line_ends_the_chat(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: input that a command did not expect (`/copy ²`: digits of other scripts). Lines
    through the real app; what they say is expected, so nothing is in the log either."""

    async def read(d: Driver, line: str) -> None:
        d.screen.prompt.text = line  # completion sees it too
        await d.pilot.pause()
        d.screen.prompt.text = ""
        d.screen.prompt.post_message(d.screen.prompt.Submitted(line))
        await d.pilot.pause(0.005)
        while len(d.app.screen_stack) > 2:
            await d.pilot.press("escape")
        if d.screen.chat.busy:
            d.engine.say("x")
            await d.until(lambda: not d.screen.chat.busy)
        assert d.app.is_running and not d.app._exit, repr(line)
        assert not log_file().exists(), repr(line)

    def no_document(source: str, look: object) -> readers.Document:  # readers have their own tests
        raise readers.DocumentError(f"there is no file {source}.")

    async def script(d: Driver) -> None:
        monkeypatch.setattr("leankv_app.opening.read_document", no_document)
        await d.loaded()
        await d.said("hello", "a reply")
        lines = [f"{name} {odd}" for name in COMMANDS if name not in LEFT_OUT for odd in ODD]
        chosen = random.Random(19).sample(lines, count)
        for line in ("/copy ²", "/copy 0", "/copy " + "9" * 5000, "/set __class__ x", *chosen):
            await read(d, line)
        await d.said("still there?", "yes")

    drive(script, tmp_path)


def test_what_nobody_expected_is_one_line_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: an exception that leaves a handler, a worker or an action ends the app."""

    def broken(*args: object) -> None:
        raise RuntimeError(f"broken\nby {args[-1]!r}")

    async def script(d: Driver) -> None:
        await d.loaded()
        monkeypatch.setattr(d.screen.slash, "stats", lambda rest: broken("a handler"))
        await d.type("/stats")
        await d.shows("RuntimeError: broken by 'a handler' (the traceback is in")
        monkeypatch.setattr(
            "leankv_app.opening.read_document", lambda path, look: broken("a worker")
        )
        await d.type("/file x.txt")
        await d.shows("RuntimeError: broken by 'a worker'")
        monkeypatch.setattr(d.screen, "open_settings", lambda: broken("an action"))
        await d.pilot.press("f3")
        await d.shows("RuntimeError: broken by 'an action'")
        monkeypatch.setattr(d.screen.panel, "memory", lambda event: broken("an event"))
        await d.said("hello", "a reply")
        await d.shows("a reply")

    drive(script, tmp_path)
    log = log_file().read_text()
    assert log.count("Traceback (most recent call last)") >= 3
    assert "test_guard.py" in log


def test_what_breaks_a_part_of_the_app_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: Textual's own crash screen, which prints the values of all variables."""

    async def script(d: Driver) -> None:
        secret = "what the user wrote"
        d.app._handle_exception(RuntimeError(f"broken {len(secret)}"))
        await d.pilot.pause()

    with pytest.raises(RuntimeError, match="broken"):
        drive(script, tmp_path)
    assert "RuntimeError: broken 19" in log_file().read_text()
    printed = capsys.readouterr()
    assert "what the user wrote" not in printed.out + printed.err


def test_the_log_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a file that is appended to for ever."""
    monkeypatch.setattr("leankv_mlx.faults._MOST_BYTES", 5000)
    for number in range(60):
        line = described(ValueError(f"{number} " + "x" * 200))
    assert str(log_file()) in line
    assert "\n" not in line
    sizes = [path.stat().st_size for path in log_file().parent.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 6000
    assert len(described(ValueError("y" * 10_000))) < 700


def test_a_log_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANKV_HOME", "/dev/null/x")
    assert described(ValueError("no")) == "ValueError: no"
