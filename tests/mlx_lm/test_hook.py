"""mlx-lm's own commands with `--kv`, each run as a user types it, in a process of its own."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mlx_lm.models import base, llama

from leankv_mlx.cli import app as cli
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.tasks import document_turn
from leankv_mlx.mlx_lm import hook
from leankv_mlx.mlx_lm.commands import SESSIONS
from tests.mlx_lm.commands import (
    LONG,
    MODEL,
    ONE_ERROR,
    PTH,
    SUMMARY,
    hooked_environment,
    run,
    script,
    server,
)

Here = Callable[..., tuple[int, str, str]]
GENERATE = ["--model", MODEL, "--max-tokens", "3", "--prompt", LONG]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hooked_environment(tmp_path_factory.mktemp("hook"))


def summary_of(stderr: str) -> tuple[int, float, str]:
    """Tokens, ratio and backend of the line that ends stderr."""
    found = SUMMARY.search(stderr)
    assert found and stderr.endswith(found[0]), stderr
    return int(found[1]), float(found[2]), found[3]


def everything(module: ModuleType) -> list[Any]:
    """What the hook may replace for the time of a command."""
    return [
        dict(vars(module)), dict(vars(argparse.ArgumentParser)), sys.excepthook,
        list(sys.meta_path), llama.scaled_dot_product_attention,
    ]  # fmt: skip


def test_every_command_that_is_hooked_has_its_class() -> None:
    assert set(hook.COMMANDS) == set(SESSIONS)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """Runs a command in this process, hooked as at the start of one: exit code, stdout, stderr."""

    def run_here(command: str, *arguments: str) -> tuple[int, str, str]:
        module = import_module(f"mlx_lm.{command}")
        monkeypatch.setattr(sys, "orig_argv", ["python", f"/bin/mlx_lm.{command}", *arguments])
        monkeypatch.setattr(sys, "argv", [f"mlx_lm.{command}", *arguments])
        monkeypatch.delenv("LEANKV_NO_HOOK", raising=False)
        before = everything(module)
        try:
            hook.install()
            module.main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        finally:
            hook.uninstall()
        assert everything(module) == before
        return code, *capfd.readouterr()

    return run_here


@pytest.mark.parametrize(
    "form",
    [
        ["mlx_lm.generate"],
        ["mlx_lm", "generate"],
        ["python", "-m", "mlx_lm", "generate"],
        ["python", "-W", "ignore", "-um", "mlx_lm.generate"],
    ],
)
def test_generate_in_every_form(form: list[str], env: dict[str, str]) -> None:
    ran = run([*form, "--kv", "leankv:k4v3", *GENERATE], env)
    assert ran.returncode == 0, ran.stderr
    assert "Generation: 3 tokens" in ran.stdout
    tokens, ratio, _ = summary_of(ran.stderr)
    assert tokens > 300 and ratio > 2


def test_without_kv_nothing_changes(env: dict[str, str], tmp_path: Path) -> None:
    file = str(tmp_path / "stock.safetensors")
    save = ["--model", MODEL, "--prompt", "hello", "--prompt-cache-file", file]
    assert run(["mlx_lm.cache_prompt", *save], env).stderr == ""
    for flags in (["--prompt-cache-file", file, "-m", "3", "--verbose", "F"], ["--kv-bits", "x"]):
        command = ["mlx_lm.generate", "--prompt", "hi", *flags]
        a, b = run(command, env), run(command, env | {"LEANKV_NO_HOOK": "1"})
        assert (a.returncode, a.stdout, a.stderr) == (b.returncode, b.stdout, b.stderr)
        assert a.returncode == (2 if "x" in flags else 0)


def test_the_hook_can_be_turned_off(env: dict[str, str]) -> None:
    ran = run(["mlx_lm.chat", "--kv", "leankv"], env | {"LEANKV_NO_HOOK": "1"})
    assert ran.returncode == 2
    assert "unrecognized arguments: --kv" in ran.stderr


def test_chat(env: dict[str, str]) -> None:
    command = ["mlx_lm.chat", "--kv", "leankv", "--model", MODEL, "--max-tokens", "3"]
    ran = run(command, env, text=f"{LONG}\nr\nhello\nq\n")
    assert ran.returncode == 0, ran.stderr
    tokens, _, _ = summary_of(ran.stderr)
    assert tokens < 30  # the conversation before the reset counts no more


def test_benchmark(env: dict[str, str]) -> None:
    sizes = ["-p", "300", "-g", "4", "-n", "1"]
    ran = run(["mlx_lm.benchmark", "--kv=leankv:k2v2", "--model", MODEL, *sizes], env)
    assert ran.returncode == 0, ran.stderr
    assert "Averages: " in ran.stdout
    tokens, ratio, _ = summary_of(ran.stderr)
    assert tokens in (303, 304) and ratio > 2


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (["generate", *GENERATE, "--kv", "leankv:k5v4"], 2, "k_bits=5 is not supported"),
        (["generate", *GENERATE, "--kv", "leankv", "--kv-bits", "4"], 2, "--kv-bits does nothing"),
        (["server", "--kv", "leankv", "--kv-bits", "8"], 2, "--kv-bits does nothing"),
        (["chat", "--kv", "leankv", "--max-kv-size", "99"], 2, "--max-kv-size does nothing"),
        (["chat", "--kv", "leankv", "--nosuch"], 2, "unrecognized arguments: --nosuch"),
        (["generate", "--kv", "leankv", "--model", "/no/model"], 1, "no model folder /no/model"),
        (["server", "--kv", "leankv", "--model", "/no/model"], 1, "no model folder /no/model"),
        (["benchmark", "--kv", "leankv", "--model", MODEL, "-b", "2"], 2, "--batch-size 2"),
        (
            ["cache_prompt", "--kv", "leankv", "--prompt", "x", "--prompt-cache-file", "/no/x/y"],
            2,
            "cannot write /no/x/y",
        ),
        (
            ["cache_prompt", "--kv", "leankv", "--prompt", "x", "--prompt-cache-file", "/"],
            2,
            "cannot write /",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_line(command: list[str], code: int, text: str, here: Here) -> None:
    got, out, err = here(*command)
    assert (got, out) == (code, "")
    assert ONE_ERROR.fullmatch(err) and text in err


@pytest.mark.parametrize("command", ["mlx_lm.perplexity --kv leankv", "mlx_lm.evaluate --kv=x"])
def test_commands_that_refuse_kv(command: str, env: dict[str, str]) -> None:
    ran = run(command.split(), env)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ONE_ERROR.fullmatch(ran.stderr) and "does not take --kv" in ran.stderr


def test_the_exit_code_of_a_process(env: dict[str, str]) -> None:
    ran = run(["python", "-m", "mlx_lm.generate", *GENERATE, "--kv", "leankv:k5v4"], env)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("leankv: error: k_bits=5")


def test_errors_from_inside_a_model_are_one_line(
    env: dict[str, str],
) -> None:
    code = (
        "import sys; sys.orig_argv[:] = ['python', '/bin/mlx_lm.chat', '--kv', 'leankv'];"
        "from leankv_mlx.mlx_lm import hook; hook.uninstall(); hook.install();"
        "import mlx_lm.chat as chat;"
        "from leankv_mlx.errors import UnsupportedError\n"
        "def fail(*args, **options): raise UnsupportedError('two\\nlines.')\n"
        f"chat.stream_generate = fail; sys.argv = ['x', '--kv', 'leankv', '--model', {MODEL!r}];"
        "chat.main()"
    )
    ran = run(["python", "-c", code], env, text="hello\n")
    assert (ran.returncode, ran.stderr) == (1, "leankv: error: two lines.\n")


# Prompt cache files.


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


# The server.


def test_the_openai_client_streams_an_answer(env: dict[str, str]) -> None:
    openai = pytest.importorskip("openai")
    command = [script("mlx_lm.server"), "--kv", "leankv", "--model", MODEL]
    facts = "The budget of the Oslo archive is 421507. The mascot of the Lima hotel is bold owl. "
    document = facts + prose.text(random.Random(1), 3000)
    question = document_turn(document, "What is the budget of the Oslo archive?")
    messages = [{"role": "user", "content": question}]
    options: dict[str, Any] = {"model": "default_model", "max_tokens": 6, "temperature": 0}
    with (
        server(command, env) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0
        ) as client,
    ):
        stream = client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text
        first = next(chunk.usage for chunk in chunks if chunk.usage)
        assert first.completion_tokens == 6
        assert first.prompt_tokens_details.cached_tokens == 0

        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "What is the mascot of the Lima hotel?"},
        ]
        again = client.chat.completions.create(messages=messages, **options)
        assert again.choices[0].message.content
        assert again.usage.prompt_tokens_details.cached_tokens >= first.prompt_tokens - 1

        with pytest.raises(openai.APIStatusError) as caught:  # in the server's thread
            client.chat.completions.create(messages=messages, **options | {"model": "/no/model"})
        assert "no model folder /no/model" in caught.value.response.text

        def ask(_: int) -> Any:
            return client.chat.completions.create(messages=messages, **options)

        with ThreadPoolExecutor(3) as pool:  # the server takes them one after the other
            for repeated in pool.map(ask, range(3)):
                assert repeated.choices[0].message.content == again.choices[0].message.content


# The parts.


@pytest.mark.parametrize(
    ("line", "command", "arguments"),
    [
        ("python /x/bin/mlx_lm.generate --kv leankv", "generate", ["--kv", "leankv"]),
        ("python mlx_lm.chat.exe", "chat", []),
        ("python /x/bin/mlx_lm server -x", "server", ["-x"]),
        ("python -m mlx_lm.server a", "server", ["a"]),
        ("python -m mlx_lm chat a", "chat", ["a"]),
        ("python -mmlx_lm chat", "chat", []),
        ("python -X dev -Werror -Im mlx_lm.chat", "chat", []),
        ("python --check-hash-based-pycs always -m mlx_lm.chat", "chat", []),
        ("python -m mlx_lm", "", []),
        ("python -c mlx_lm.chat --kv", None, []),
        ("python -Ic mlx_lm.chat --kv", None, []),
        ("python -m other mlx_lm.chat --kv", None, []),
        ("python other.py mlx_lm.chat --kv", None, []),
        ("python -m leankv_mlx.cli generate --kv", None, []),
        ("python -m mlx_lmx.chat", None, []),
        ("python - mlx_lm.chat", None, []),
        ("python -m", None, []),
        ("python", None, []),
    ],
)
def test_command_of(line: str, command: str | None, arguments: list[str]) -> None:
    assert hook.command_of(line.split()) == (command, arguments)


def test_idle_it_costs_nothing(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = PTH.read_text().splitlines()
    assert line.startswith("import ")  # the site module runs such lines only
    loaded = "import sys; print([m for m in sys.modules if m.startswith(('leankv', 'mlx'))])"
    for extra in ([], ["--kv", "x"], ["mlx_lm.generate"]):
        assert run(["python", "-c", loaded, *extra], env).stdout == "[]\n"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mlx_lm.generate", "-p", "x" * 10**5])
    times = []
    for _ in range(50):
        start = time.perf_counter()
        exec(line, {}, {})
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 1e-3


def test_it_is_installed_once_and_out_of_the_way_while_the_command_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("mlx_lm.generate")
    arguments = ["--kv", "leankv", *GENERATE]
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/mlx_lm.generate", *arguments])
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *arguments])
    before = everything(module)
    try:
        hook.install()
        installed = everything(module)
        hook.install()
        assert everything(module) == installed != before
        module.main()
        assert llama.scaled_dot_product_attention is not base.scaled_dot_product_attention
        assert everything(module)[1] == before[1]  # argparse
    finally:
        hook.uninstall()
    assert everything(module) == before
