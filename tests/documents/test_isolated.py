"""Small input that has no end or takes all memory, and readers that fail, end as one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from leankv_mlx.documents import child, isolated
from leankv_mlx.documents.isolated import isolated_text
from leankv_mlx.documents.readers import read_document
from leankv_mlx.errors import DocumentError, UsageError
from leankv_mlx.faults import log_file
from tests.documents.files import FACT, pdf
from tests.documents.fuzz.hostile import archived, giant_sheet, lying, nested_forms

ENDLESS = nested_forms(depth=40, times=2)


def line_of(raw: bytes, name: str) -> str:
    with pytest.raises(DocumentError) as caught:
        isolated_text(raw, name)
    line = str(caught.value)
    assert "\n" not in line and name in line
    return line


def children() -> list[str]:
    """Processes that this one has made and that are still there."""
    found = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    return [line for line in found.stdout.splitlines() if child.__name__ in line]


def test_a_pdf_of_nested_forms_ends_at_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small input that has no end."""
    assert len(ENDLESS) < 10_000
    monkeypatch.setattr(isolated, "_SECONDS", 3)
    start = time.monotonic()
    line = line_of(ENDLESS, "a.pdf")
    assert "takes more than 3 seconds" in line or "memory" in line
    assert time.monotonic() - start < 10
    assert not children()


def test_a_large_document_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_SECONDS", -1)
    monkeypatch.setattr(isolated, "_BYTES_A_SECOND", 1000)
    assert "takes more than -1 seconds" in line_of(b"x", "a.txt")
    assert isolated_text(b"x " * 50_000, "a.txt")[0].startswith("x x")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound the memory at once")
def test_too_much_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input that takes all memory."""
    monkeypatch.setattr(isolated, "MAX_MEMORY", 200 * 10**6)
    assert "of memory to read; save it as plain text" in line_of(b"ab\n" * 5_000_000, "a.txt")


def test_members_that_lie_about_their_size_are_answered() -> None:
    pytest.importorskip("markitdown")
    bomb = archived({"word/document.xml": b"<w:document>" + b" " * 50_000_000})
    assert len(bomb) < 100_000
    assert "cannot be read as docx" in line_of(lying(bomb, 10), "a.docx")
    assert "unpacks to more than 500 MB" in line_of(lying(bomb, 2**31), "b.docx")


def test_a_sheet_of_two_corners_is_as_small_as_its_cells() -> None:
    """Small input that takes all memory: 17 billion cells between two."""
    pytest.importorskip("openpyxl")
    assert len(giant_sheet()) < 3000
    text, note = isolated_text(giant_sheet(), "a.xlsx")
    assert (text, note) == ("## Sheet\n| 1 |  |\n| --- | --- |\n|  | 2 |", "")


def test_values_of_a_sheet(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    import datetime

    book = openpyxl.Workbook()
    book.active.append(["day", None, "said", "when"])
    book.active.append([datetime.date(2026, 5, 1), None, "a|b\nc", datetime.time(9, 30)])
    book.active.append([])
    book.active.append([0, None, False, 0.1])
    book.create_sheet("Empty")
    book.save(tmp_path / "a.xlsx")
    assert read_document(tmp_path / "a.xlsx").text == (
        "## Sheet\n| day | said | when |\n| --- | --- | --- |\n"
        "| 2026-05-01 | a\\|b c | 09:30:00 |\n| 0 | False | 0.1 |\n\n## Empty"
    )


def test_a_text_that_is_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output has a limit too."""
    monkeypatch.setattr(isolated, "MAX_CHARACTERS", 10**6)
    assert "2 million characters and the limit is 1" in line_of(b"ab" * 10**6, "a.txt")


def test_deep_nesting_is_one_line() -> None:
    pytest.importorskip("markitdown")
    many = b"<div>" * 30_000
    text, _ = isolated_text(b"<html>" + many + b"deep", "a.html")
    assert "deep" in text


# Failures of readers


def fake(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Have the child run other code in place of its parser."""
    code = f"""
import os, sys
from leankv_mlx.documents import child, parse
def parsed(raw, name, **known):
    {body}
parse.parsed = parsed
child.main()
"""
    monkeypatch.setattr(
        isolated,
        "start",
        lambda: subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-3),
    )


def test_any_exception_of_a_reader_is_one_line_and_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """One document ends the program: any exception of a library."""
    fake(monkeypatch, "raise ZeroDivisionError('by\\nzero')")
    line = line_of(b"x", "a.txt")
    assert line == (
        "a.txt cannot be read (ZeroDivisionError: by zero; "
        f"the traceback is in {log_file()})."
    )  # fmt: skip
    log = log_file().read_text()
    assert "Traceback" in log and "ZeroDivisionError: by\nzero" in log


def test_a_reader_that_crashes_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "os.abort()")
    assert "brings its reader down" in line_of(b"x", "a.txt")
    fake(monkeypatch, "raise MemoryError")
    assert "takes more than 2 GB of memory" in line_of(b"x", "a.txt")


def test_what_a_library_prints_is_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "print('noise', flush=True); os.write(1, b'noise'); return 'text', ''")
    assert isolated_text(b"x", "a.txt") == ("text", "")


def test_errors_keep_their_kind() -> None:
    with pytest.raises(UsageError, match="no encoding klingon"):
        isolated_text(b"x", "a.txt", encoding="klingon")


@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_where_no_process_can_be_made(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    assert "no process can be started for it" in line_of(b"x", "a.txt")


# Names


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """One document ends the program: a file name that is not UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    try:
        path.write_text(FACT)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    found = read_document(path)
    assert (found.name, found.text) == ("caf\ufffd.txt", FACT)
    path.unlink()
    with pytest.raises(DocumentError, match=r"there is no file .*caf\ufffd\.txt"):
        read_document(path)


def test_homes_of_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document ends the program: `~` of a user that does not exist is the name of a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DocumentError, match=r"there is no file .*~nouser-at-all/x"):
        read_document("~nouser-at-all/x")
    Path("~$lock.txt").write_text(FACT)
    assert read_document("~$lock.txt").text == FACT


# The life of the child


def test_looking_can_stop_it() -> None:
    class Stopped(Exception):
        pass

    start = time.monotonic()

    def look() -> None:
        if time.monotonic() - start > 0.5:
            raise Stopped

    with pytest.raises(Stopped):
        isolated_text(ENDLESS, "a.pdf", look=look)
    assert time.monotonic() - start < 5
    assert not children()


def waited(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """A parser without end does not outlive the program that was killed."""
    (tmp_path / "a.pdf").write_bytes(ENDLESS)
    code = "import sys; from leankv_mlx.documents.readers import read_document as r; r(sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.pdf"])

    def made() -> list[str]:
        args = ["ps", "-o", "pid=,args=", "--ppid", str(parent.pid)]
        lines = subprocess.run(args, capture_output=True, text=True).stdout.splitlines()
        return [line.split()[0] for line in lines if child.__name__ in line]

    assert waited(lambda: bool(made()), 20)
    pid = int(made()[0])
    time.sleep(0.5)
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def ended() -> bool:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        return state.stdout.strip()[:1] in ("", "Z")

    assert waited(ended, 10)


def test_it_imports_nothing_of_the_folder_it_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside a document is never run as a module."""
    (tmp_path / "json.py").write_text("raise SystemExit('run')")
    (tmp_path / "a.pdf").write_bytes(pdf(tmp_path / "b.pdf", [FACT]).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(path).absolute()) for path in sys.path if path])
    assert FACT in read_document("a.pdf").text


def test_it_imports_neither_models_nor_screens() -> None:
    code = (
        "import sys; from leankv_mlx.documents import child; "
        "child.reply({'document': {'name': 'a'}, 'characters': 9}, b'x'); "
        "print({'mlx', 'mlx_lm', 'textual', 'numpy', 'urllib.request'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr
