"""`leankv serve` as a command; what it serves is tested in tests/mlx_lm/test_server.py."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from leankv_mlx.cli import app
from leankv_mlx.mlx_lm import flags
from leankv_mlx.mlx_lm.commands import server
from tests.mlx_lm.commands import MODEL

QUIET = ["--log-level", "ERROR"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kv-memory", "much"], "'much' is not a size"),
        (["--kv-memory", "0"], "--kv-memory 0"),
        (["--prompt-cache-bytes", "much"], "'much' is not a size"),
        (["--kv-store-size", "1GB"], "--kv-store-size does nothing without --kv-store"),
        (["--kv", "none", "--kv-memory", "1GB"], "--kv-memory does nothing beside --kv none"),
        (["--kv", "none", "--kv-store", "on"], "--kv-store does nothing beside --kv none"),
        (["--kv-bits", "4"], "--kv-bits does nothing"),
        (["--decode-concurrency", "0"], "--decode-concurrency must be at least 1"),
        (["--kv-store", __file__], "is a file"),
        (["-m", "/no/such"], "no model folder /no/such"),
        (["--nosuch"], "unrecognized arguments: --nosuch; see leankv serve --help"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen at 192.0.2.1:0"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["serve", *QUIET, *arguments]) == (1 if "-m" in arguments else 2)
    out, err = capfd.readouterr()
    assert re.fullmatch(r"leankv: error: [^\n]+\n", _without_warning(err))
    assert text in err and not out


def _without_warning(err: str) -> str:
    """mlx-lm warns that its server has but basic checks."""
    return re.sub(r"[^\n]*UserWarning[^\n]*\n[^\n]*warnings.warn\(\n", "", err)


def test_a_damaged_model_ends_it_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in Path(MODEL).iterdir():
        content = file.read_bytes()
        end = 1000 if file.suffix == ".safetensors" else len(content)
        (tmp_path / file.name).write_bytes(content[:end])
    assert app.run(["serve", *QUIET, "--model", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert re.fullmatch(r"leankv: error: cannot load the model in [^\n]+\n", err) and not out


def test_help_is_what_the_parser_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.perf_counter()
    assert app.run(["serve", "--help"]) == 0
    assert time.perf_counter() - start < 5
    said = capfd.readouterr().out
    # The same from the parser that a run has.
    with pytest.raises(SystemExit):
        server.run_serve(["--help"])
    assert capfd.readouterr().out == said == flags.serve_help("leankv serve", "leankv")
    for flag in ("usage: leankv serve", "--kv KV", "--kv-memory SIZE", "--kv-store FOLDER"):
        assert flag in said
