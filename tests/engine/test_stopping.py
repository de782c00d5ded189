"""How soon a prompt, a document or a load can be stopped, and that looking changes nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.engine.test_engine import FACT, Driver, document  # isort: skip
from tests.gguf.files import TINY, built, gguf_weights, write  # isort: skip

from leankv_mlx.config import CompressionConfig
from leankv_mlx.engine.events import Downloading, Failed, Loaded, Prefill, Stopped, Text
from leankv_mlx.engine.requests import Load, Read, Reply, Turn
from leankv_mlx.mlx_lm.attachment import attach, make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel, load
from leankv_mlx.mlx_lm.reading import Pace, read
from leankv_mlx.models.conversion import convert

TOKENS = [int(token) for token in np.random.default_rng(0).integers(5, 400, 700)]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load()


class Fixed(Pace):
    """Parts of one size."""

    def part(self, held: int) -> int:
        return 96


def test_parts_are_sized_by_time() -> None:
    """Kind: a number of tokens between two looks, which may take a minute."""
    pace = Pace()
    assert pace.part(0) == 32  # nothing is known yet
    pace.speed = 8.0  # tokens per second, a large model on a small machine
    assert pace.part(0) == 32
    pace.speed = 400.0
    assert pace.part(0) == 192
    pace.speed = 1e9
    assert pace.part(0) == 2048
    pace.speed = 8.0
    assert pace.part(100_000) == 384  # decoding what is stored must stay the smaller share


@pytest.mark.parametrize("kv", ["leankv", "leankv:policy=budget,ratio=4", "none"])
def test_what_a_cache_holds_does_not_depend_on_the_parts(demo: LoadedModel, kv: str) -> None:
    """Kind: results that depend on the speed of the machine."""
    config = None if kv == "none" else CompressionConfig.parse(kv)
    attachment = attach(demo.model, config) if config else None
    if attachment:
        attachment.start()
    found = []
    for pace in (None, Fixed()):
        caches, seen = make_caches(demo.model), []
        for start in range(0, len(TOKENS), 512):
            read(demo.model, TOKENS[start : start + 512], caches, pace, seen.append)
        assert seen == ([512, 188] if pace is None else [96, 192, 288, 384, 480, 512, 96, 188])
        logits = [demo.model(mx.array([[token]]), cache=caches)[0, -1] for token in (7, 9, 11)]
        state = [cache.memory() for cache in caches] if config else None
        found.append((np.stack([np.array(x.astype(mx.float32)) for x in logits]), state))
    if attachment:
        attachment.stop()
    (whole, held), (parts, also) = found
    assert held == also
    # Sums in another order, in bfloat16; chunks of 96 would differ by several units.
    assert np.abs(whole - parts).max() < 0.05 * np.abs(whole).max()


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make every token of a prompt take so long."""
    from leankv_mlx.mlx_lm import reading

    original = reading._read

    def waiting(model: Any, part: Any, caches: Any, pace: Any) -> None:
        time.sleep(seconds * len(part))
        original(model, part, caches, None)
        if pace is not None:
            pace.speed = 1 / seconds

    monkeypatch.setattr(reading, "_read", waiting)


@pytest.mark.parametrize("what", ["question", "document", "summary"])
def test_a_slow_prompt_is_stopped_soon(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: Esc during prefill does nothing for up to a minute. 512 tokens would take 15 s."""
    driver = Driver()
    driver.engine.submit(Load())
    driver.wait(Loaded)
    slow(monkeypatch, 0.03)
    stopped_at: list[float] = []

    def stop(event: Any) -> None:
        if isinstance(event, Prefill) and not stopped_at:
            stopped_at.append(time.monotonic())
            driver.engine.stop(1)

    driver.hook = stop
    said = (Turn("user", document(90)),)
    if what == "document":
        driver.engine.submit(Read(1, said, "a.txt"))
    else:
        driver.engine.submit(Reply(1, said, summary=what == "summary"))
    assert driver.wait(Stopped) == Stopped(1, "prefill", 0)
    assert time.monotonic() - stopped_at[0] < 3
    driver.engine.close()


def test_a_download_is_stopped_and_the_model_before_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kind: nothing stops a download but the end of the app."""
    driver = Driver()
    driver.engine.submit(Load())
    driver.wait(Loaded)
    from leankv_mlx.engine import worker
    from leankv_mlx.errors import ModelError

    resolve = worker.resolve

    def download(model: str | None, progress: Any, *rest: Any) -> Path:
        if model is None:
            return resolve(None, progress, *rest)
        bar = progress(total=10**9, unit="B")
        try:
            for _ in range(10_000):
                bar.update(1)
                time.sleep(0.002)
        except Exception as error:  # as the hub's client does it
            raise ModelError("the download failed") from error
        raise AssertionError("not stopped")

    monkeypatch.setattr(worker, "resolve", download)
    driver.hook = lambda event: driver.engine.stop(0) if isinstance(event, Downloading) else None
    driver.engine.submit(Load("owner/name"))
    assert driver.wait(Stopped) == Stopped(0, "load", 0)
    driver.hook = lambda event: None
    driver.engine.submit(Reply(2, (Turn("user", f"Document:\n{FACT}\n\nWhat?"),), max_tokens=2))
    driver.wait(Text)
    driver.engine.submit(Load())  # asked for after the stop
    driver.wait(Loaded)
    driver.engine.close()


def test_a_conversion_can_be_stopped(tmp_path: Path) -> None:
    """Kind: a long first step that nothing stops."""

    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    write(tmp_path / "a.gguf", TINY["llama"], gguf_weights(TINY["llama"], built(TINY["llama"])))
    with pytest.raises(StopError):
        convert(tmp_path / "a.gguf", tmp_path / "folder", look=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_question_for_a_model_that_did_not_load_is_not_answered_by_another() -> None:
    """Kind: a request and a load race; requests carry what they were made for."""
    driver = Driver()
    driver.engine.submit(Load())
    driver.wait(Loaded)
    said = (Turn("user", "hello"),)
    driver.engine.submit(Load("/no/such"))
    driver.engine.submit(Reply(1, said, max_tokens=2, model="/no/such"))
    driver.engine.submit(Reply(2, said, max_tokens=2, model=""))
    failed = []
    while len(failed) < 2:
        event = driver._queue.get(timeout=60)
        if isinstance(event, Failed):
            failed.append((event.request, event.kind, event.message))
    assert [row[:2] for row in failed] == [(0, "load"), (1, "reply")]
    assert "the question was for /no/such, which is not loaded" in failed[1][2]
    driver.wait(Text)
    driver.engine.close()
