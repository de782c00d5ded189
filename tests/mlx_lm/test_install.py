"""The literal commands in fresh virtual environments, from a wheel and from an editable install."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlx_lm.commands import LONG, MODEL, ONE_ERROR, ROOT, SUMMARY, run, script, server

pytestmark = pytest.mark.slow
EXTRA = "" if sys.platform == "darwin" else "[cpu]"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture(scope="module", params=["wheel", "editable"])
def scripts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder of commands of an environment that holds the package and what it needs."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    scripts = folder / "bin"
    how = ["--editable"] if request.param == "editable" else []
    install = [script("pip", scripts), "install", "--quiet", *how, f"{ROOT}{EXTRA}"]
    subprocess.run(install, check=True, env=ENVIRONMENT)
    here = Path.cwd()
    os.chdir(folder)  # where the repository cannot be imported from
    yield scripts
    os.chdir(here)


def test_the_package_is_where_it_should_be(scripts: Path) -> None:
    code = "import leankv_mlx; print(leankv_mlx.__file__)"
    package = run(["python", "-c", code], ENVIRONMENT, folder=scripts).stdout.strip()
    expected = ROOT if "editable" in str(scripts) else scripts.parent
    assert Path(package).is_relative_to(expected)


@pytest.mark.parametrize("form", ["mlx_lm.{}", "mlx_lm {}", "python -m mlx_lm {}",
                                  "python -m mlx_lm.{}"])  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "chat", "benchmark", "cache_prompt"])
def test_every_command_in_every_form(
    form: str, command: str, scripts: Path, tmp_path: Path
) -> None:
    flags = {
        "generate": ["--prompt", LONG, "--max-tokens", "3"],
        "chat": ["--max-tokens", "3"],
        "benchmark": ["-p", "300", "-g", "3", "-n", "1"],
        "cache_prompt": ["--prompt", LONG, "--prompt-cache-file", str(tmp_path / "file")],
    }[command]
    line = [*form.format(command).split(), "--kv", "leankv:k4v3", "--model", MODEL, *flags]
    ran = run(line, ENVIRONMENT, text=f"{LONG}\nq\n", folder=scripts)
    assert ran.returncode == 0, ran.stderr
    found = SUMMARY.search(ran.stderr)
    assert found and int(found[1]) > 300 and float(found[2]) > 2


def test_a_prompt_cache_file(scripts: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    save = ["mlx_lm.cache_prompt", "--kv", "leankv:k3v3", "--model", MODEL, "--prompt", LONG]
    ask = ["mlx_lm.generate", "--prompt", "what?", "--max-tokens", "3", "--prompt-cache-file", file]
    saved = run([*save, "--prompt-cache-file", file], ENVIRONMENT, folder=scripts)
    assert saved.returncode == 0, saved.stderr
    ran = run([*ask, "--kv", "leankv"], ENVIRONMENT, folder=scripts)
    assert ran.returncode == 0, ran.stderr
    assert SUMMARY.search(ran.stderr)
    without = run(ask, ENVIRONMENT, folder=scripts)
    assert without.returncode == 2
    assert ONE_ERROR.fullmatch(without.stderr) and "add --kv leankv" in without.stderr


def test_what_is_refused(scripts: Path) -> None:
    for line in ("perplexity", "evaluate --tasks x"):
        command = f"mlx_lm.{line} --kv leankv --model {MODEL}".split()
        ran = run(command, ENVIRONMENT, folder=scripts)
        assert ran.returncode == 2
        assert ONE_ERROR.fullmatch(ran.stderr)


@pytest.mark.parametrize("form", ["mlx_lm.server", "python -m mlx_lm server"])
def test_the_openai_client(form: str, scripts: Path) -> None:
    openai = pytest.importorskip("openai")
    program, *rest = form.split()
    command = [script(program, scripts), *rest, "--kv", "leankv", "--model", MODEL]
    with (
        server(command, ENVIRONMENT) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client,
    ):
        chunks = client.chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": LONG}],
            max_tokens=5,
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
