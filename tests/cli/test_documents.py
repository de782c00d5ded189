"""leankv-summarize, leankv ask, leankv cache and leankv generate --file as users type them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from leankv_mlx.cli import app, summarize
from tests.documents.files import FACT, PARAGRAPHS, QUESTION, encrypted_pdf, pdf, prose, text_file

SECOND = "She carried a small lamp and a letter from the mayor."


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def report(tmp_path: Path) -> str:
    return str(text_file(tmp_path / "report.txt"))


@pytest.fixture
def long(tmp_path: Path) -> str:
    paragraphs = [prose(10, 10 * i + 1) for i in range(7)]
    return str(text_file(tmp_path / "long.txt", [*paragraphs[:5], FACT, *paragraphs[5:]]))


def asked(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert app.run(["ask", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_ask(report: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["ask", report, QUESTION]) == 0
    out, err = capfd.readouterr()
    assert out == f"{FACT}\n"
    assert err == ""


def test_the_second_ask_starts_at_once(long: str, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = asked(capfd, long, QUESTION), asked(capfd, long, QUESTION)
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["answer"] == second["answer"]
    assert "48213" in first["answer"]
    assert first["document_tokens"] == second["document_tokens"] > 1200
    assert second["time_to_first_token_s"] < first["time_to_first_token_s"]
    assert first["kv_bytes"] == second["kv_bytes"] < first["kv_bytes_fp16"] / 2.5
    assert app.run(["cache", "list", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed["nbytes"] == pytest.approx(first["document_kv_bytes"], rel=0.05)
    assert asked(capfd, long, QUESTION, "--no-cache")["cached"] is False


def test_commands_share_what_was_read(report: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert asked(capfd, report, QUESTION)["cached"] is False
    assert summarize.run([report, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["cached"] is True
    assert app.run(["generate", "--file", report, "--prompt", QUESTION, "--verbose", "False"]) == 0
    assert FACT in capfd.readouterr().out
    assert app.run(["cache", "list", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["entries"]) == 1


def test_cache_list_rm_path(
    report: str, own_home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["cache", "list"]) == 0
    assert "0.0 MB of at most 10,000 MB" in capfd.readouterr().out
    asked(capfd, report, QUESTION)
    asked(capfd, str(text_file(tmp_path / "other.txt", [FACT])), QUESTION)
    assert app.run(["cache", "path"]) == 0
    assert capfd.readouterr().out == f"{own_home}/cache/documents\n"
    assert app.run(["cache", "list"]) == 0
    out = capfd.readouterr().out
    assert "report.txt" in out and "other.txt" in out
    key = re.search(r"│ (\w{12}) │ other", out)
    assert key, out
    assert app.run(["cache", "rm", key[1]]) == 0
    assert capfd.readouterr().out.startswith("removed 1, 0.")
    for arguments, text in (
        (["rm", key[1]], "no key begins with"),
        (["rm", ""], "no key begins with"),
        (["rm", "../x"], "no key begins with"),
        (["rm"], "name the keys"),
        (["rm", "--all", "x"], "name the keys"),
    ):
        assert app.run(["cache", *arguments]) == 2
        assert text in capfd.readouterr().err
    assert app.run(["cache", "rm", "--all"]) == 0
    assert app.run(["cache", "list", "--json"]) == 0
    assert json.loads(capfd.readouterr().out.partition("\n")[2])["entries"] == []


def test_a_cache_that_is_not_wanted(
    report: str, own_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEANKV_CACHE_LIMIT", "0")
    for _ in range(2):
        assert asked(capfd, report, QUESTION)["cached"] is False
    assert not own_home.exists()
    monkeypatch.setenv("LEANKV_CACHE_LIMIT", "many")
    assert app.run(["ask", report, QUESTION]) == 2
    assert "LEANKV_CACHE_LIMIT: 'many' is not a size" in capfd.readouterr().err


def test_generate_with_a_file(report: str, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert app.run(["generate", "--file", report, "--prompt", QUESTION]) == 0
        out, err = capfd.readouterr()
        assert FACT in out
        assert err.startswith("leankv: ")
    assert re.search(r"Prompt: 1\d tokens", out)  # the question alone
    assert app.run(["generate", "--file", report, "--prompt", QUESTION, "--kv", "none"]) == 0
    assert FACT in capfd.readouterr().out
    assert app.run(["generate", "--prompt", "hello", "--max-tokens", "2"]) == 0


def test_a_backslash_in_a_document_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leankv_mlx.mlx_lm import document_prompt

    seen: list[str] = []
    original = document_prompt.prompts.beginning

    def spied(tokens_of: Any, text: str) -> list[int]:
        seen.append(text)
        return original(tokens_of, text)

    monkeypatch.setattr(document_prompt.prompts, "beginning", spied)
    path = text_file(tmp_path / "a.txt", [r"C:\new\table. " * 20])
    arguments = ["--file", str(path), "--prompt", r"one\ntwo", "--max-tokens", "2"]
    assert app.run(["generate", *arguments]) == 0
    assert r"C:\new\table." in seen[0]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ([], "say what to do with the file"),
        (["--prompt", "x", "--max-kv-size", "99", "--kv", "none"], "--max-kv-size does not go"),
        (["--prompt", "x", "--draft-model", "y"], "--draft-model does not go with --file"),
        (["--prompt", "x", "--prompt-cache-file", "y"], "--prompt-cache-file does not go"),
    ],
)
def test_generate_with_a_file_and_what_contradicts_it(
    extra: list[str], text: str, report: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["generate", "--file", report, *extra]) == 2
    assert text in capfd.readouterr().err


# leankv-summarize


def test_summaries_go_to_stdout_and_numbers_to_stderr(
    report: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = str(pdf(tmp_path / "other.pdf", PARAGRAPHS))
    assert summarize.run([report, other, "--stats"]) == 0
    out, err = capfd.readouterr()
    headings = re.findall(r"^## (.+)$", out, re.M)
    assert headings == ["report.txt", "other.pdf"]
    assert out.count(SECOND) == 2
    assert err.count("leankv: ") == 4
    assert "single" in err and "first token after" in err
    assert summarize.run([report, "--no-stream", "--format", "text"]) == 0
    streamed, (out, err) = out, capfd.readouterr()
    assert SECOND in out and out.strip() in streamed
    assert err == ""


def test_json_and_files(report: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    assert summarize.run([report, report, "--json", "-o", str(target)]) == 0
    out, _ = capfd.readouterr()
    assert out == ""
    rows = json.loads(target.read_text())
    assert [row["document"] for row in rows] == ["report.txt"] * 2
    assert [row["cached"] for row in rows] == [False, True]
    assert rows[0]["summary"] == rows[1]["summary"]
    assert rows[0]["strategy"] == "single"
    assert summarize.run([report, "-o", str(tmp_path / "out.md")]) == 0
    assert (tmp_path / "out.md").read_text() == rows[0]["summary"] + "\n"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_what_is_complete_stays_when_a_later_one_fails(
    report: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    too_long = str(text_file(tmp_path / "b.txt", ["word " * 8100]))
    target = tmp_path / "out.json"
    for output in ([], ["-o", str(target)]):
        assert summarize.run([report, too_long, "--json", "--strategy", "single", *output]) == 2
        out, err = capfd.readouterr()
        rows = json.loads(target.read_text() if output else out)
        assert [row["document"] for row in rows] == ["report.txt"]
        assert err.count("\n") == 1


def test_dry_run_reads_nothing(
    long: str, own_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert summarize.run([long, "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"KV \d\.\d\d MB, uncompressed \d\.\d\d MB \(fits\)", out)
    assert out.endswith("one pass\n")
    assert err == ""
    budget = ["--memory-budget", "800kB", "--max-tokens", "64"]
    assert summarize.run([long, "--dry-run", *budget, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["strategy"] == "map-reduce"
    assert found["kv_bytes"] > found["budget"] == 800_000
    assert found["pieces"] > 1
    assert not own_home.exists()
    assert summarize.run([long, *budget, "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["rounds"][0] == found["pieces"]
    assert made["strategy"] == "map-reduce"


def test_stdin(
    report: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = Path(report).read_bytes()
    code = "from leankv_mlx.cli import summarize; summarize.main()"
    ran = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, timeout=120)
    assert ran.returncode == 0
    assert SECOND.encode() in ran.stdout
    assert ran.stderr == b""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert summarize.run(["-"]) == 0
    assert SECOND in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["/no/such/file"], 1, "there is no file /no/such/file"),
        (["http://no.such.host.invalid/x"], 1, "check the address and the network"),
        (["{encrypted}"], 1, "is encrypted"),
        (["{scanned}"], 1, "is scanned"),
        (["{large}"], 1, "the limit is 100 MB"),
        (["{report}", "-o", "/no/such/folder/x"], 2, "name a file in a folder that exists"),
        (["{report}", "--kv", "nosuch"], 2, "unknown KV setting"),
        (["{report}", "--memory-budget", "much"], 2, "is not a size"),
        (["{report}", "--memory-budget", "9kB"], 2, "raise --memory-budget"),
        (["{report}", "--strategy", "single", "--memory-budget", "200kB"], 2, "the budget is"),
        (["{report}", "--length", "huge"], 2, "see leankv-summarize --help"),
        (["{report}", "--encoding", "klingon"], 2, "no encoding klingon"),
        (["{report}", "-m", "/no/such/model"], 1, "no model folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    text: str,
    report: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {"report": report}
    places["encrypted"] = str(encrypted_pdf(tmp_path / "a.pdf"))
    places["scanned"] = str(pdf(tmp_path / "b.pdf", [""], images=(0,)))
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(2 * 10**9)
    places["large"] = str(tmp_path / "large.txt")
    assert summarize.run([word.format(**places) for word in arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("leankv-summarize: error: ")
    assert err.count("\n") == 1
    assert text in err


def test_a_damaged_entry_is_one_note(
    report: str, own_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = asked(capfd, report, QUESTION)
    (path,) = (own_home / "cache" / "documents").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert app.run(["ask", report, QUESTION]) == 0
    out, err = capfd.readouterr()
    assert out.strip() == first["answer"]
    assert err.startswith("leankv: note: the kept copy of report.txt is not used and made anew: ")
    assert err.count("\n") == 1
    assert asked(capfd, report, QUESTION)["cached"] is True


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from leankv_mlx.cli import summarize
from leankv_mlx.documents.partials import Partials

keep = Partials.keep

def kept(self, *answer):
    keep(self, *answer)
    os.kill(os.getpid(), signal.SIGINT)

Partials.keep = kept
summarize.main()
"""


def test_ctrl_c_keeps_the_partial_summaries(
    long: str, own_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [long, "--memory-budget", "800kB", "--max-tokens", "32", "--json"]
    command = [sys.executable, "-c", INTERRUPTED, *arguments]
    stopped = subprocess.run(command, capture_output=True, timeout=120)
    assert stopped.returncode == 130
    assert stopped.stdout == b""
    assert re.fullmatch(
        rb"leankv: note: stopped; partial summaries kept: 1\. The same [^\n]+\n", stopped.stderr
    )
    assert summarize.run(arguments) == 0
    assert json.loads(capfd.readouterr().out)["resumed"] == 1
    assert not list((own_home / "cache" / "summaries").iterdir())


def test_progress_is_for_terminals_and_goes_away(report: str) -> None:
    code = "from leankv_mlx.cli import summarize; summarize.main()"
    ours, theirs = pty.openpty()
    ran = subprocess.run(
        [sys.executable, "-c", code, report], stdout=subprocess.PIPE, stderr=theirs, timeout=120
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert ran.returncode == 0
    assert b"reading report.txt" in shown
    assert b"reading" not in ran.stdout
    assert SECOND.encode() in ran.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_no_model_library(arguments: list[str]) -> None:
    code = (
        "import sys; from leankv_mlx.cli import summarize; "
        f"code = summarize.run({arguments!r}); "
        "print(code, sorted({'mlx', 'mlx.core', 'mlx_lm', 'textual'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "0 []"
