"""What a line of the prompt is: the kind of fault is a text that goes to nobody, or elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.harness import Driver, drive  # isort: skip

from leankv_app.typed import command_of, path_of, source_of
from leankv_mlx.engine.requests import Read
from leankv_mlx.folders import expanded

MESSAGES = [
    "// a comment",
    "//",
    "/* a comment */ int x;",
    "/**",
    "/etc/hosts: what is it?",
    "/usr/bin and /etc",
    "/no/such/file.txt",
    "/no/such/file.txt /etc/hosts",
    "hello /help",
    "'quoted'",
    "file://",
    "~",
    "a/b",
    "",
]
COMMANDS = [
    ("/help", ("/help", "")),
    ("  /help  ", ("/help", "")),
    ("/system You are\nbrief.", ("/system", "You are\nbrief.")),
    ("/system\nYou are brief.", ("/system", "You are brief.")),
    ("/file\t/etc/hosts", ("/file", "/etc/hosts")),
    ("/nosuch thing", ("/nosuch", "thing")),
    ("/[x]", ("/[x]", "")),
    ("/", ("/", "")),
]
PATHS = [
    ("a b.txt", "a b.txt"),
    ("'a b.txt'", "a b.txt"),
    ('"a b.txt"', "a b.txt"),
    (r"a\ b.txt", "a b.txt"),
    ("  a b.txt ", "a b.txt"),
    ("file:///x/a%20b.txt", "/x/a b.txt"),
    ("'file:///x/a%20b.txt'", "/x/a b.txt"),
    ("file://localhost/x/%E4%B8%AD.txt", "/x/中.txt"),
    ("file:///x/caf%E9.txt", "/x/caf\udce9.txt"),
    ("it's.txt", "it's.txt"),
    ("two words", "two words"),
    ("owner/name", "owner/name"),
    ("~nouser/x", "~nouser/x"),
    ("~$lock.docx", "~$lock.docx"),
    ("'~/a b.txt'", "~/a b.txt"),
    ("http://a.example/b c?d='e'", "http://a.example/b c?d='e'"),
    ("HTTPS://a.example/", "HTTPS://a.example/"),
    ("a\0b", "a\0b"),
]


@pytest.mark.parametrize("line", MESSAGES)
def test_messages(line: str) -> None:
    assert command_of(line) is None


@pytest.mark.parametrize(("line", "command"), COMMANDS)
def test_commands(line: str, command: tuple[str, str]) -> None:
    assert command_of(line) == command


@pytest.mark.parametrize(("typed", "path"), PATHS)
def test_paths(typed: str, path: str) -> None:
    assert path_of(typed) == path


def test_what_exists_as_it_is_written_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("'quoted'", r"back\slash", "file:x", "~$lock.docx", "it's"):
        Path(name).write_text("x")
        assert path_of(name) == name


def test_a_home_is_expanded_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    assert source_of("~/a b.txt") == "/home/ada/a b.txt"
    assert source_of("~nosuchuser/x") == str(tmp_path / "~nosuchuser" / "x")
    assert source_of("~$lock.docx") == str(tmp_path / "~$lock.docx")
    assert source_of("http://a.example/~x//y") == "http://a.example/~x//y"
    assert expanded("~\0x") == tmp_path / "~\0x"


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "file://{}", "{} "])
def test_a_dropped_file_is_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("The plan.")
    assert command_of(form.format(path)) == ("/file", form.format(path).strip())
    assert command_of(form.format(tmp_path)) is None  # a folder is no document
    assert command_of(f"{form.format(path)}: what is it?") is None
    escaped = tmp_path / "a b.txt"
    escaped.write_text("The plan.")
    assert command_of(str(escaped).replace(" ", r"\ ")) is not None


def test_lines_go_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.txt", "~$lock.docx"):
        Path(name).write_text(f"The text of {name}.")

    async def script(d: Driver) -> None:
        await d.loaded()
        for message in ("// a comment", "/etc/hosts: what is it?"):
            await d.said(message, "A reply.")
            assert d.engine.reply.turns[-1].text == message
        await d.type("/nosuch thing")
        await d.shows("There is no command /nosuch")
        for typed, name in (
            ("'a b.txt'", "a b.txt"), ('"a b.txt"', "a b.txt"), (r"a\ b.txt", "a b.txt"),
            (f"file://{tmp_path}/a%20b.txt", "a b.txt"), ("~$lock.docx", "~$lock.docx"),
        ):  # fmt: skip
            before = len(d.engine.requests)
            await d.type(f"/file {typed}")
            await d.until(lambda before=before: len(d.engine.requests) > before)
            assert isinstance(d.engine.read, Read)
            assert f"The text of {name}." in d.engine.read.turns[-1].text
        await d.type("/file ~nosuchuser/x")
        await d.shows("There is no file")
        assert len(d.app.screen_stack) == 2  # a line by the prompt, no dialog
        await d.type("/export '~nosuchuser/a b.md'")
        await d.shows("a b.md")
        assert (tmp_path / "~nosuchuser" / "a b.md").exists()

    drive(script, tmp_path)
