"""How the commands answer, whatever is typed: one name, one flag, one place for help."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from leankv_mlx.cli import app, summarize
from leankv_mlx.cli.console import console
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm import flags, load, prompts
from tests.mlx_lm.commands import LONG, MODEL, hooked_environment, run, script, server

ROOT = Path(app.__file__).parents[2]


@pytest.mark.parametrize("arguments", [["models"], ["plan", "qwen3-0.6b"], ["cache", "list"]])
def test_lists_fit_80_columns(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    report = tmp_path / "The annual report of the observatory.txt"
    report.write_text("A report.")
    assert app.run(["ask", str(report), "what?", "--max-tokens", "1"]) == 0
    capfd.readouterr()
    assert app.run(arguments) == 0
    out = capfd.readouterr().out
    # cut off, or with a number on two lines, is what a table does that has no room
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "…" not in out
    for whole in {"models": ["131,072", "mlx-community/Llama-3.2-1B-Instruct-4bit"],
                  "plan": ["40,960", "leankv:k4v4", "times fp16"],
                  "cache": ["last used", "The annual report of"]}[arguments[0]]:  # fmt: skip
        assert whole in out


def test_nothing_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["cache"]):
        assert app.run(arguments) == 2
        out, err = capfd.readouterr()
        assert "Usage: leankv" in out
        assert err == ""


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["chat", "--help"], ["--resume", "leankv chat"]),
        (["summarize", "--help"], ["--strategy", "leankv summarize"]),
    ],
)
def test_one_command_has_everything(
    arguments: list[str], names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 0
    out = capfd.readouterr().out
    for name in names:
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "help_of"),
    [
        (["ask"], "leankv ask"),
        (["cache", "rm", "--nosuch"], "leankv cache rm"),
        (["chat", "--nosuch"], "leankv chat"),
        (["models", "import"], "leankv models import"),
        (["nosuch"], "leankv"),
        (["plan"], "leankv plan"),
        (["summarize", "--nosuch"], "leankv summarize"),
    ],
)
def test_an_error_points_at_the_help_of_its_command(
    arguments: list[str], help_of: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    assert capfd.readouterr().err.endswith(f"; see {help_of} --help.\n")
    assert summarize.run(["--nosuch"]) == 2
    assert capfd.readouterr().err.endswith("; see leankv-summarize --help.\n")


@pytest.mark.parametrize("text", ["small", "k3v3", "leankv:small", "leankv:k3v3", " small "])
def test_a_profile_is_a_setting_everywhere(text: str) -> None:
    assert CompressionConfig.parse(text) == CompressionConfig.parse("leankv:k3v3")


def test_the_model_has_one_short_flag(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("ask", "bench", "calibrate", "chat", "demo", "eval", "summarize"):
        assert app.run([name, "--help"]) == 0
        assert re.search(r"--model +-m\b", capfd.readouterr().out), name
    for flag in ("-m", "-m5", "-m=5"):  # --max-tokens in mlx-lm's command
        assert app.run(["generate", flag, "5"]) == 2
        assert "-m is --model in commands of leankv" in capfd.readouterr().err


def test_help_of_generate_is_that_of_mlx_lm_without_its_imports() -> None:
    from mlx_lm.generate import setup_arg_parser

    parser = setup_arg_parser()
    parser.prog = "leankv generate"
    flags.add_flags(parser, "leankv", demo=True, file=True)
    assert flags.generate_help("leankv generate", "leankv") == parser.format_help()
    code = (
        "import sys; from leankv_mlx.cli import app; code = app.run(['generate', '--help']); "
        "print(code, sorted({'mlx', 'mlx_lm', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("command", ["mlx_lm.server", "mlx_lm.generate"])
def test_help_of_mlx_lm_names_our_flag(command: str, tmp_path: Path) -> None:
    ran = run([command, "--help"], hooked_environment(tmp_path))
    assert ran.returncode == 0
    assert "--kv KV" in ran.stdout


def test_the_log_of_the_server_says_what_is_saved(tmp_path: Path) -> None:
    arguments = [script("mlx_lm.server"), "--model", MODEL, "--kv", "leankv"]
    body = b'{"messages": [{"role": "user", "content": "%s"}], "max_tokens": 3}' % LONG.encode()
    with server(arguments, hooked_environment(tmp_path), tmp_path / "log") as address:
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).read()
        end = time.monotonic() + 20
        while " tokens, KV " not in (log := (tmp_path / "log").read_text()):
            assert time.monotonic() < end, log
            time.sleep(0.1)
    assert "leankv: leankv:k4v4, 5 of 5 layers compressed, backend " in log
    assert re.search(r"leankv: \d+ tokens, KV \d\.\d\d MB \(fp16 \d\.\d\d MB\), [23]\.\d\dx", log)


def test_a_long_text_brings_no_warning_of_the_tokenizer() -> None:
    loaded = load()
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        loaded.tokenizer._tokenizer.model_max_length = 100
        assert len(prompts.encode(loaded.tokenizer, LONG)) > 100
    finally:
        logger.removeHandler(handler)
    assert said.getvalue() == ""


def test_a_console_shows_markup_and_controls_as_text() -> None:
    file = io.StringIO()
    console(file=file, width=60).print("a\x1b[31mb", "\x9b", markup=False)
    assert file.getvalue() == "a[31mb \n"
