"""A text that is far too long is refused before its tokens take gigabytes: the tokenizer is never
given much more of it than fits."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from leankv_mlx.cli import app, summarize
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.reader import Reader
from leankv_mlx.engine import Engine
from leankv_mlx.engine.events import Event, Failed, Loaded
from leankv_mlx.engine.requests import Load, Read, Reply, Turn
from leankv_mlx.errors import ContextLengthError
from leankv_mlx.mlx_lm import load, prompts
from tests.documents.files import prose

CHARACTERS = 3_000_000
BOUND = 300_000
TEXT = (prose(100) + "\n") * (CHARACTERS // len(prose(100)))


class Given:
    """The longest text that a tokenizer was given at once, and all of them together."""

    longest = total = 0


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    found, original = Given(), PreTrainedTokenizerBase.encode

    def encode(self: Any, text: str, *args: Any, **options: Any) -> Any:
        found.longest, found.total = max(found.longest, len(text)), found.total + len(text)
        return original(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "encode", encode)
    return found


def test_a_question_about_what_cannot_fit(given: Given) -> None:
    with (
        Reader(load(), CompressionConfig()) as reader,
        pytest.raises(
            ContextLengthError, match=r"has about \d+0000 tokens and the model's context"
        ),
    ):
        reader.answer(TEXT, "What?", 16)
    assert given.total < BOUND


def test_the_chat_refuses_what_cannot_fit(given: Given) -> None:
    events: queue.Queue[Event] = queue.Queue()
    engine = Engine(events.put)
    engine.start()

    def wait(kind: type[Event]) -> Any:
        while not isinstance(event := events.get(timeout=60), kind):
            pass
        return event

    try:
        engine.submit(Load())
        wait(Loaded)
        for request in (Read(1, (Turn("user", TEXT),)), Reply(2, (Turn("user", TEXT),))):
            engine.submit(request)
            assert "tokens and the model's context" in wait(Failed).message
    finally:
        engine.close()
    assert given.total < 2 * BOUND


def test_commands_refuse_what_cannot_fit(
    given: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "a.txt")
    Path(path).write_text(TEXT)
    assert app.run(["ask", path, "What?"]) == 2
    assert app.run(["generate", "--file", path, "--prompt", "What?"]) == 2
    assert summarize.run([path, "--strategy", "single"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "error:" in line and "model's context" in line][2:]
    assert given.total < 4 * BOUND


def test_summaries_of_a_long_text_count_it_in_parts(
    given: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:600_000])
    assert summarize.run([str(tmp_path / "a.txt"), "--dry-run"]) == 0
    assert "pieces, then their summaries" in capfd.readouterr().out
    assert given.longest < BOUND


def test_a_text_in_parts_has_hardly_more_tokens() -> None:
    tokenizer = load(lazy=True).tokenizer
    text = TEXT[:350_000]
    whole = len(prompts.encode(tokenizer, text))
    assert whole <= prompts.count(tokenizer, text) <= whole + 3 * 8
    assert prompts.estimate(tokenizer, text, whole) is None
    about = prompts.estimate(tokenizer, text, whole // 2)
    assert about is not None and abs(about - whole) < whole / 20
