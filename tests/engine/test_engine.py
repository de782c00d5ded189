"""The engine's thread with the demo model: replies, reuse, stops, other compressions, failures."""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from leankv_mlx.engine import Engine
from leankv_mlx.engine.events import (
    Done,
    Event,
    Failed,
    Loaded,
    Noted,
    Prefill,
    Recoded,
    Snapshot,
    Stopped,
    Text,
)
from leankv_mlx.engine.requests import Forget, Load, Read, Recode, Reply, Turn
from leankv_mlx.evaluation.fidelity import corpus
from leankv_mlx.evaluation.sparsifying import thresholds
from leankv_mlx.mlx_lm import load
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.projections.sparsity import save
from tests.quantized_model import quantized_demo

E = TypeVar("E", bound=Event)
FACT = "The access code of the Oslo archive is 48213."
QUESTION = "What is the access code of the Oslo archive?"


def document(sentences: int) -> str:
    filler = (f"The rooms of the Lima hotel on floor {i} are quiet at night." for i in range(99))
    body = list(filler)[:sentences]
    return " ".join([*body[: sentences // 2], FACT, *body[sentences // 2 :]])


def turns(sentences: int = 30) -> tuple[Turn, ...]:
    return (Turn("user", f"Document:\n{document(sentences)}\n\n{QUESTION}"),)


class Driver:
    """An engine whose events are kept and can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._queue: queue.Queue[Event] = queue.Queue()
        self.hook: Callable[[Event], None] = lambda event: None
        self.engine = Engine(self._emit, snapshot_seconds=0.05)
        self.engine.start()

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        self.hook(event)
        self._queue.put(event)

    def wait(self, *kinds: type[E]) -> E:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            event = self._queue.get(timeout=60)
            if isinstance(event, kinds):
                return event
            if isinstance(event, Failed):
                raise AssertionError(event.message)
        raise AssertionError("no such event")

    def reply(self, number: int, said: tuple[Turn, ...], **options: Any) -> tuple[str, Done]:
        self.engine.submit(Reply(number, said, **options))
        done = self.wait(Done)
        return self.text(number), done

    def text(self, number: int) -> str:
        return "".join(
            event.text
            for event in self.events
            if isinstance(event, Text) and event.request == number
        )

    def snapshot(self) -> Snapshot:
        return [event for event in self.events if isinstance(event, Snapshot)][-1]


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    made.engine.submit(Load())
    made.wait(Loaded)
    yield made
    made.engine.close()


def test_a_reply_comes_in_pieces_with_progress_and_snapshots(driver: Driver) -> None:
    text, done = driver.reply(1, turns())
    assert "48213" in text
    assert done.reason == "stop"
    assert done.reused == 0
    pieces = [event for event in driver.events if isinstance(event, Text)]
    assert len(pieces) > 5
    assert pieces[-1].tokens == done.tokens
    reading = [event for event in driver.events if isinstance(event, Prefill)]
    assert reading[0].done == 0
    assert reading[-1].done == reading[-1].total == done.prompt_tokens
    driver.wait(Snapshot)
    last = driver.snapshot()
    assert last.tokens == done.prompt_tokens + done.tokens + 1  # and the token that ended it
    assert last.ratio > 2
    assert last.used == sum(layer.used for layer in last.layers)
    assert len(last.layers) == 5
    for layer in last.layers:
        assert layer.used - 2 <= sum(layer.heads) <= layer.used
    assert last.context_left == 8192 - last.tokens


def test_snapshots_tell_what_a_step_read_of_the_weights(driver: Driver, tmp_path: Path) -> None:
    small = load(quantized_demo(tmp_path / "small"))
    chunks = corpus(small, None, 256, 1).chunks
    found = thresholds(small.model, "teal", "uniform", [0.4], chunks, lambda what, tokens: None)
    save(replace(found, model=fingerprint(small.path), name="small"), "of-the-engine")
    driver.engine.submit(Load(str(small.path), "leankv:sparse=0.4@of-the-engine"))
    driver.wait(Loaded)
    driver.reply(1, turns())
    driver.wait(Snapshot)
    assert 0.4 < driver.snapshot().weights_read < 0.8
    driver.engine.submit(Recode("leankv"))
    driver.wait(Recoded)
    driver.reply(2, turns())
    driver.wait(Snapshot)
    assert driver.snapshot().weights_read == 1
    driver.engine.submit(Recode("leankv:sparse=0.3"))
    with pytest.raises(AssertionError, match=r"run leankv calibrate NAME --sparse 0\.3"):
        driver.wait(Recoded)


def test_the_next_turn_reads_only_what_is_new(driver: Driver) -> None:
    text, first = driver.reply(1, turns())
    said = (*turns(), Turn("assistant", text), Turn("user", QUESTION))
    again, second = driver.reply(2, said)
    assert "48213" in again
    assert second.reused == first.prompt_tokens + first.tokens + 1
    assert second.prompt_tokens - second.reused < 30


def test_a_document_is_read_before_its_question(driver: Driver) -> None:
    head = turns()[0].text.removesuffix(QUESTION)
    driver.engine.submit(Read(1, (Turn("user", head),)))
    read = driver.wait(Done)
    assert read.tokens == 0
    assert driver.text(1) == ""
    text, done = driver.reply(2, turns())
    assert done.reused == read.prompt_tokens > done.prompt_tokens - 30
    assert "48213" in text


def test_a_document_that_was_read_before_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    head = turns()[0].text.removesuffix(QUESTION)
    texts = []
    for opened in (False, True):
        driver = Driver()
        driver.engine.submit(Load())
        driver.wait(Loaded)
        driver.engine.submit(Read(1, (Turn("user", head),), "report.txt"))
        read = driver.wait(Done)
        assert (read.reused == read.prompt_tokens) is opened
        text, done = driver.reply(2, turns())
        assert done.reused == read.prompt_tokens
        texts.append(text)
        # Another compression has a file of its own.
        driver.engine.submit(Recode("leankv:k3v3"))
        driver.wait(Recoded)
        driver.engine.submit(Forget())
        driver.engine.submit(Read(3, (Turn("user", head),), "report.txt"))
        read = driver.wait(Done)
        assert (read.reused == read.prompt_tokens) is opened
        driver.engine.close()
    assert texts[0] == texts[1]
    files = list((tmp_path / "cache" / "documents").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    driver = Driver()
    driver.engine.submit(Load())
    driver.engine.submit(Read(1, (Turn("user", head),), "report.txt"))
    assert "report.txt is not used and made anew" in driver.wait(Noted).text
    assert driver.wait(Done).reused == 0
    assert driver.reply(2, turns())[0] == texts[0]
    driver.engine.close()


def test_only_what_has_a_name_and_is_read_by_itself_is_kept(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    driver.engine.submit(Load())
    driver.wait(Loaded)
    head = turns()[0].text.removesuffix(QUESTION)
    driver.engine.submit(Read(1, (Turn("user", head),)))
    driver.wait(Done)
    driver.engine.submit(Read(2, (Turn("user", head + "more\n\n"),), "goes on"))
    driver.wait(Done)
    driver.engine.submit(Forget())
    driver.hook = lambda event: driver.engine.stop(3) if isinstance(event, Prefill) else None
    driver.engine.submit(Read(3, (Turn("user", head),), "stopped"))
    driver.wait(Stopped)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_changed_history_keeps_the_common_prefix(driver: Driver) -> None:
    _, first = driver.reply(1, turns())
    other = (Turn("user", turns()[0].text.replace(QUESTION, "Summarize the document.")),)
    _, second = driver.reply(2, other, max_tokens=4)
    assert second.reason == "length"
    assert first.prompt_tokens - 40 < second.reused < first.prompt_tokens


@pytest.mark.parametrize("kv", ["leankv", "none"])
def test_stopping_in_prefill_leaves_a_cache_that_goes_on(kv: str) -> None:
    driver = Driver()
    driver.engine.submit(Load(kv=kv))
    driver.wait(Loaded)

    def stop(event: Event) -> None:
        if isinstance(event, Prefill) and event.request == 1 and event.done:
            driver.engine.stop(1)

    driver.hook = stop
    driver.engine.submit(Reply(1, turns(40)))
    stopped = driver.wait(Stopped)
    assert (stopped.stage, stopped.tokens) == ("prefill", 0)
    text, done = driver.reply(2, turns(40))
    assert done.reused == 32  # of 512 that are compressed together
    assert "48213" in text
    driver.engine.submit(Forget())
    assert driver.reply(3, turns(40))[0] == text
    driver.engine.close()


def test_stopping_in_decode_keeps_the_partial_reply(driver: Driver) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Text) and event.tokens == 5:
            driver.engine.stop(event.request)

    driver.hook = stop
    driver.engine.submit(Reply(1, turns()))
    stopped = driver.wait(Stopped)
    assert stopped.stage == "decode"
    assert 5 <= stopped.tokens <= 6
    driver.hook = lambda event: None
    said = (*turns(), Turn("assistant", driver.text(1)), Turn("user", QUESTION))
    text, done = driver.reply(2, said)
    assert "48213" in text
    prompt = next(event for event in driver.events if isinstance(event, Prefill)).total
    assert done.reused == prompt + stopped.tokens


def test_a_waiting_reply_can_be_stopped(driver: Driver) -> None:
    driver.engine.stop(1)
    driver.engine.submit(Reply(1, turns()))
    assert driver.wait(Stopped) == Stopped(1, "prefill", 0)


def test_fewer_bits_are_reached_without_reading_again(driver: Driver) -> None:
    text, first = driver.reply(1, turns(40))
    driver.engine.submit(Recode("leankv:k3v3"))
    changed = driver.wait(Recoded)
    assert not changed.reread
    assert 0 < changed.after < changed.before
    said = (*turns(40), Turn("assistant", text), Turn("user", QUESTION))
    again, second = driver.reply(2, said)
    assert second.reused > first.prompt_tokens
    assert "48213" in again


def test_more_bits_need_the_conversation_again(driver: Driver) -> None:
    text, _ = driver.reply(1, turns())
    driver.engine.submit(Recode("none"))
    changed = driver.wait(Recoded)
    assert changed.reread
    assert (changed.backend, changed.after) == ("none", 0)
    said = (*turns(), Turn("assistant", text), Turn("user", QUESTION))
    again, done = driver.reply(2, said)
    assert done.reused == 0
    assert "48213" in again
    driver.engine.submit(Recode("leankv"))
    changed = driver.wait(Recoded)
    assert not changed.reread
    assert changed.after < changed.before / 2


def test_dropped_tokens_are_read_again_for_a_setting_that_keeps_them(driver: Driver) -> None:
    driver.engine.submit(Recode("leankv:policy=streaming,window=32"))
    driver.wait(Recoded)
    driver.reply(1, turns(40), max_tokens=4)
    last = driver.snapshot()
    assert last.used == sum(layer.used for layer in last.layers)
    assert last.codes == 0  # nothing but the first tokens and the window
    driver.engine.submit(Recode("leankv"))
    assert driver.wait(Recoded).reread
    text, _ = driver.reply(2, turns(40))
    assert "48213" in text


def test_failures_are_events_and_the_engine_goes_on(driver: Driver) -> None:
    def failure(request: Any) -> str:
        driver.engine.submit(request)
        while not isinstance(event := driver._queue.get(timeout=60), Failed):
            pass
        return event.message

    assert "no model folder /no/such" in failure(Load("/no/such"))
    assert "unknown KV setting" in failure(Recode("nosuch"))
    assert "the model's context 8192" in failure(Reply(1, (Turn("user", "word " * 9000),)))
    text, _ = driver.reply(2, turns())
    assert "48213" in text


def test_a_budget_that_is_too_small_is_said_before_reading() -> None:
    driver = Driver()
    driver.engine.submit(Load(budget=200_000))
    driver.wait(Loaded)
    driver.engine.submit(Reply(1, turns()))
    while not isinstance(event := driver._queue.get(timeout=60), Failed):
        assert not isinstance(event, Prefill)
    assert "the budget is 0.2 MB" in event.message
    driver.engine.close()


def test_importing_the_engine_imports_no_model_library() -> None:
    code = (
        "import sys; from leankv_mlx.engine import Engine, Recorder, ReplayEngine; "
        "from leankv_mlx.engine.catalogue import catalogue; catalogue(); "
        "print(sorted({'mlx', 'mlx.core', 'mlx_lm', 'textual'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
