"""The `leankv` command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models import llama

from leankv_mlx.cli import app
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.demo import demo_document, grade, number_document
from leankv_mlx.evaluation.tasks import SUMMARY_QUESTION
from leankv_mlx.kernels import resolve_backend
from leankv_mlx.mlx_lm import load
from leankv_mlx.resources import demo_model
from tests.real_models import real_model

ROOT = Path(app.__file__).parents[2]
SUMMARY = re.compile(
    r"leankv: (\d+) tokens, KV (\d+\.\d\d) MB \(fp16 (\d+\.\d\d) MB\), (\d+\.\d\d)x, backend (\w+)"
)


def leankv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "leankv_mlx.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["generate", "--kv", "nosuch"], 2, "unknown KV setting 'nosuch'"),
        (["generate", "--kv", "leankv:nosuch"], 2, "unknown KV setting 'nosuch'"),
        (["generate", "--kv", "leankv:k5v4"], 2, "k_bits=5 is not supported"),
        (["generate", "--kv", "leankv:window=16"], 2, "window=16 is too small; use at least 32"),
        (["generate", "--kv", "leankv:backend=tpu"], 2, "backend=tpu is unknown"),
        (["generate", "--model", "/no/such/folder"], 1, "no model folder /no/such/folder"),
        (["generate", "--model", "nosuch"], 1, "no model folder nosuch"),
        (["generate", "--kv-bits", "4"], 2, "--kv-bits does nothing beside --kv leankv"),
        (["generate", "--kv-bits", "4", "--kv", "leankv:k3v3"], 2, "--kv-bits does nothing"),
        (["generate", "--max-kv-size", "512"], 2, "--max-kv-size does nothing"),
        (["generate", "--nosuch"], 2, "unrecognized arguments: --nosuch"),
        (["generate", "--max-tokens", "many"], 2, "invalid int value"),
        (["generate", "--max-tokens", "0"], 2, "--max-tokens 0"),
        (["generate", "--prompt", "word " * 9000], 2, "tokens and the model's context 8192"),
        (["generate", "--prompt-cache-file", "/no/file"], 2, "no prompt cache file /no/file"),
        (["demo", "--kv", "nosuch"], 2, "unknown KV setting 'nosuch'"),
        (["demo", "--tokens", "50"], 2, "--tokens 50 is too short"),
        (["demo", "--tokens", "9000"], 2, "9000 tokens and the model's context 8192"),
        (["demo", "--tokens", "x"], 2, "see leankv demo --help"),
        (["demo", "--model", "/no/such/folder"], 1, "no model folder"),
        (["nosuch"], 2, "No such command"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("leankv: error: ")
    assert err.count("\n") == 1
    assert text in err


def test_a_hub_id_without_network_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert app.run(["generate", "--model", "owner/name"]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "the hub cannot be reached" in err


def test_an_error_restores_everything(capfd: pytest.CaptureFixture[str]) -> None:
    from mlx_lm.models import base

    module = sys.modules["mlx_lm.generate"]
    before = dict(vars(module)), list(sys.argv)
    assert app.run(["generate", "--prompt", "word " * 9000]) == 2
    assert app.run(["generate", "--prompt", "hello", "--max-tokens", "2"]) == 0
    assert (dict(vars(module)), list(sys.argv)) == before
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_debug_shows_the_traceback_wherever_it_stands(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "demo", "--kv", "x"], ["generate", "--kv", "x", "--debug"]):
        assert app.run(arguments) == 2
        err = capfd.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("leankv: error: unknown KV setting 'x'")


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("leankv_mlx.mlx_lm.loading.resolve_model", interrupted)
    monkeypatch.setattr("leankv_mlx.mlx_lm.commands.session.resolve_model", interrupted)
    assert app.run(["demo"]) == 130
    assert app.run(["generate"]) == 130


def test_unexpected_errors_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("first\nsecond")

    monkeypatch.setattr("leankv_mlx.mlx_lm.commands.session.resolve_model", broken)
    assert app.run(["generate"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("leankv: error: IndexError: first second (the traceback is in ")
    assert err.count("\n") == 1
    log = err.rstrip("\n").rpartition(" in ")[2].rstrip(")")
    assert "Traceback" in Path(log).read_text() and "in broken" in Path(log).read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help_imports_no_model_library(arguments: list[str]) -> None:
    code = (
        "import sys; from leankv_mlx.cli import app; "
        f"code = app.run({arguments!r}); "
        "print(code, sorted({'mlx', 'mlx.core', 'mlx_lm', 'textual'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "0 []"


def test_generate_help_shows_the_flags_of_mlx_lm_and_ours(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert app.run(["generate", "--help"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    for flag in ("usage: leankv generate", "--kv KV", "--temp", "--draft-model", "the bundled one"):
        assert flag in out


def test_generate_ends_with_the_summary_line() -> None:
    ran = leankv("generate", "--prompt", "tell me a story. " * 80, "--max-tokens", "5")
    assert ran.returncode == 0
    assert "Generation: 5 tokens" in ran.stdout
    assert ran.stderr.count("\n") == 1
    found = SUMMARY.fullmatch(ran.stderr.strip())
    assert found
    assert int(found[1]) > 400
    assert float(found[4]) > 2
    assert float(found[3]) / float(found[2]) == pytest.approx(float(found[4]), rel=0.05)


@pytest.mark.parametrize(
    ("extra", "ratio", "backend"),
    [
        (["--kv", "none"], 1.0, "none"),
        (["--kv", "none", "--kv-bits", "4", "--quantized-kv-start", "0"], 3.56, "none"),
        (["--draft-model", str(demo_model())], None, None),
    ],
)
def test_generate_counts_every_cache(
    extra: list[str], ratio: float | None, backend: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--prompt", "tell me a story. " * 40, "--max-tokens", "5"]
    assert app.run([*arguments, *extra]) == 0
    found = SUMMARY.fullmatch(capfd.readouterr().err.strip())
    assert found
    assert found[5] == (backend or resolve_backend().name)
    if ratio is not None:
        assert float(found[4]) == pytest.approx(ratio, abs=0.02)


def test_demo_shows_both_caches(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["demo", "--tokens", "300"]) == 0
    out = capfd.readouterr().out
    for text in ("uncompressed", "leankv:k4v4", "KV bytes in use", "decode", "smaller", "expected"):
        assert text in out


def test_demo_json_is_one_document(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["demo", "--tokens", "400", "--kv", "leankv:k8v8,window=32", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    plain, compressed = result["arms"]
    assert plain["kv"] == "none"
    assert compressed["kv"] == "leankv:k8v8,window=32"
    assert plain["usage"]["tokens"] == result["document_tokens"] == compressed["usage"]["tokens"]
    assert plain["usage"]["used"] == plain["usage"]["fp16"]  # the demo model is bf16
    assert result["ratio"] == plain["usage"]["used"] / compressed["usage"]["used"] > 1
    assert len(result["questions"]) == 5
    for question in result["questions"]:
        assert {"text", "expected", "answers"} == set(question)
        assert len(question["answers"]) == 2
    for arm in result["arms"]:
        assert arm["prefill_tokens_per_second"] > 0
        assert arm["decode_tokens_per_second"] > 0


def test_demo_asks_other_models_for_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The bundled model under another name: it is asked as any chat model is."""
    folder = tmp_path / "Some-Model"
    folder.symlink_to(demo_model(), target_is_directory=True)
    assert app.run(["demo", "--model", str(folder), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["model"] == "Some-Model"
    assert 900 < result["document_tokens"] < 1000
    assert [arm["right"] for arm in result["arms"]] == [4, 4]
    for question in result["questions"]:
        assert re.fullmatch(r"What is the [a-z ]+ of the \S+ [a-z]+\?", question["text"])
        assert re.fullmatch(r"\d{4,6}", question["expected"])


def test_demo_counts_an_answer_in_any_words() -> None:
    chat = number_document(load(), 400, 1)
    ask, value = chat.turns[0]
    assert value in chat.document
    assert grade(chat, ask, value, f"It's {value}!") == 1
    assert grade(chat, ask, value, f"It's {value}0.") == 0
    with pytest.raises(UsageError, match="--tokens 60 is too short"):
        number_document(load(), 60, 1)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder"])
def test_demo_with_a_chat_model(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = real_model(name)
    assert app.run(["demo", "--model", str(file), "--kv", "leankv:k8v8", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["model"] == file.name
    assert all(arm["right"] >= 3 for arm in result["arms"])


def test_demo_asks_the_same_every_time() -> None:
    loaded = load()
    chat = demo_document(loaded, 3000, 1)
    assert chat == demo_document(loaded, 3000, 1)
    assert chat != demo_document(loaded, 3000, 2)
    assert len(loaded.tokenizer.encode(chat.document)) > 2900
    assert [SUMMARY_QUESTION in question for question, _ in chat.turns].count(True) == 1
    assert len(chat.turns) == 5


def test_doctor(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "backend: reference" in out
    assert app.run(["doctor", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["problems"] == []
    assert facts["backends"]["reference"]["available"]
    assert facts["backends"][facts["auto"]]["available"]
    assert facts["demo_model"]["complete"]
    assert facts["versions"]["mlx"]


def test_doctor_tells_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leankv_mlx.resources.demo_model", lambda: tmp_path)
    assert app.run(["doctor"]) == 1
    assert "problem: the demo model is not complete" in capfd.readouterr().out


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capfd.readouterr().out.startswith("leankv 0.")
