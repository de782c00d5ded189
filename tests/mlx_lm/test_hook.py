"""mlx-lm's own commands with `--kv`, each run as a user types it, in a process of its own."""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models import base, llama

from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.tasks import document_turn
from leankv_mlx.mlx_lm import hook
from leankv_mlx.mlx_lm.commands import SESSIONS
from tests.mlx_lm.commands import (
    LONG,
    MODEL,
    ONE_ERROR,
    PTH,
    Here,
    everything,
    run,
    script,
    server,
    summary_of,
)

GENERATE = ["--model", MODEL, "--max-tokens", "3", "--prompt", LONG]


def test_every_command_that_is_hooked_has_its_class() -> None:
    assert set(hook.COMMANDS) == set(SESSIONS)


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


def test_benchmark_of_a_batch(env: dict[str, str]) -> None:
    sizes = ["-p", "300", "-g", "4", "-n", "1", "-b", "3"]
    ran = run(["mlx_lm.benchmark", "--kv=leankv:k2v2", "--model", MODEL, *sizes], env)
    assert ran.returncode == 0, ran.stderr
    assert "batch_size=3" in ran.stdout and "Averages: " in ran.stdout
    tokens, ratio, _ = summary_of(ran.stderr)
    assert tokens == 304 and ratio > 2  # of each, and of all


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

        with ThreadPoolExecutor(3) as pool:  # the server takes them together
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
