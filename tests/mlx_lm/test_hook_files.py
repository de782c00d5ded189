"""Prompt cache files of mlx-lm's own commands with `--kv`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from leankv_mlx.cli import app as cli
from tests.mlx_lm.commands import LONG, MODEL, ONE_ERROR, Here, run, summary_of


@pytest.fixture(scope="module")
def cached(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that `mlx_lm.cache_prompt --kv leankv:k4v3` made."""
    file = tmp_path_factory.mktemp("cached") / "prompt"
    flags = ["--kv", "leankv:k4v3", "--model", MODEL, "--prompt-cache-file", str(file)]
    ran = run(["mlx_lm.cache_prompt", *flags, "--prompt", LONG], env)
    assert ran.returncode == 0, ran.stderr
    tokens, ratio, _ = summary_of(ran.stderr)
    assert tokens > 300 and ratio > 2
    assert file.stat().st_size < tokens * 5 * 2 * 2 * 64 * 2 / 2  # half of fp16
    return file


QUESTION = ["--prompt", "what?", "--max-tokens", "12", "--verbose", "F", "--prompt-cache-file"]


def test_a_prompt_cache_answers(
    cached: Path, env: dict[str, str], here: Here, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = run(["mlx_lm.generate", *QUESTION, str(cached), "--kv", "leankv"], env)
    assert bare.returncode == 0, bare.stderr
    assert summary_of(bare.stderr)[1] > 2
    spelled = here("generate", *QUESTION, str(cached), "--kv", "leankv:k4v3", "--model", MODEL)
    assert spelled[:2] == (0, bare.stdout)
    assert cli.run(["generate", *QUESTION, str(cached)]) == 0  # leankv generate
    assert capfd.readouterr().out == bare.stdout


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        ([], 2, "holds a compressed cache; add --kv leankv"),
        (["--kv", "none"], 2, "holds a compressed cache; use --kv leankv"),
        (["--kv", "leankv:k4v4"], 2, "holds leankv:k4v3, not leankv:k4v4; use --kv leankv"),
        (["--kv", "leankv", "--model", "/no/model"], 1, "no model folder /no/model"),
        (["--kv", "leankv", "--draft-model", MODEL], 2, "drop --draft-model"),
    ],
)
def test_a_prompt_cache_with_other_flags(
    flags: list[str], code: int, text: str, cached: Path, here: Here
) -> None:
    got, out, err = here("generate", *QUESTION, str(cached), *flags)
    assert (got, out) == (code, "")
    assert ONE_ERROR.fullmatch(err) and text in err


def copy_of_the_model(folder: Path, changed: bool) -> Path:
    folder.mkdir()
    for file in Path(MODEL).iterdir():
        (folder / file.name).symlink_to(file)
    if changed:
        text = (folder / "config.json").read_text()
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(text.replace("100000.0", "50000.0"))
    return folder


def test_a_prompt_cache_goes_with_its_model(cached: Path, here: Here, tmp_path: Path) -> None:
    same, other = (copy_of_the_model(tmp_path / str(x), x) for x in (False, True))
    ask = [*QUESTION, str(cached), "--kv", "leankv", "--model"]
    assert here("generate", *ask, str(same))[0] == 0
    code, _, err = here("generate", *ask, str(other))
    assert code == 2
    assert ONE_ERROR.fullmatch(err) and f"not with {other}" in err


def test_a_prompt_cache_of_a_model_that_has_changed(here: Here, tmp_path: Path) -> None:
    model = str(copy_of_the_model(tmp_path / "model", False))
    ask = ["--prompt-cache-file", str(tmp_path / "file"), "--kv", "leankv"]
    assert here("cache_prompt", "--model", model, "--prompt", "hello", *ask)[0] == 0
    shutil.rmtree(model)
    copy_of_the_model(tmp_path / "model", True)
    code, out, err = here("generate", "--prompt", "x", *ask)
    assert (code, out) == (1, "")
    assert ONE_ERROR.fullmatch(err) and "made with another model" in err


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("damaged", 1, "its digest does not fit"),
        ("foreign", 2, "holds no compressed cache"),
        ("missing", 2, "no prompt cache file"),
    ],
)
def test_damaged_and_foreign_prompt_caches(
    name: str, code: int, text: str, cached: Path, here: Here, tmp_path: Path
) -> None:
    damaged = bytearray(cached.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    (tmp_path / "foreign").write_bytes(b"\0" * 100)
    got, out, err = here("generate", *QUESTION, str(tmp_path / name), "--kv", "leankv")
    assert (got, out) == (code, "")
    assert ONE_ERROR.fullmatch(err) and text in err


def test_a_prompt_that_is_too_long_to_cache(here: Here, tmp_path: Path) -> None:
    flags = ["--model", MODEL, "--prompt-cache-file", str(tmp_path / "file"), "--kv", "leankv"]
    code, _, err = here("cache_prompt", *flags, "--prompt", "word " * 9000)
    assert code == 2
    assert ONE_ERROR.fullmatch(err) and "context 8192" in err
    assert not list(tmp_path.iterdir())
