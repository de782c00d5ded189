"""Recordings: what is written is read back equal, and played back in order."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from leankv_mlx.engine import Recorder, ReplayEngine
from leankv_mlx.engine.events import (
    EVENTS,
    Done,
    Downloading,
    Event,
    Failed,
    LayerUse,
    Loaded,
    Loading,
    Noted,
    Prefill,
    Recoded,
    Snapshot,
    Stopped,
    Text,
)
from leankv_mlx.engine.record import dumped, read
from leankv_mlx.engine.requests import Load, Reply, Turn
from leankv_mlx.errors import UsageError

LAYERS = (LayerUse(True, 10, 40, (6, 4)),)
ONE_OF_EACH: list[Event] = [
    Loading("m"),
    Downloading("m", 1, 2),
    Loaded("m", "m", 8192, "leankv", "reference", 1, 1, "", 5, 100),
    Prefill(7, 1, 2, 0),
    Text(7, "naïve\n```", 1),
    Snapshot(7, 3, 40, 1, 2, 3, 4, 0, 0, 12, 99, 50, 1.5, LAYERS),
    Done(7, "stop", 2, 0, 1, 0.5, 0.25),
    Text(9, "second", 1),
    Stopped(9, "decode", 1),
    Recoded("leankv:k3v3", "reference", 1, False, 10, 8),
    Failed(0, "load", "no"),
    Noted("not kept"),
]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    passed: list[Event] = []
    recorder = Recorder(path, passed.append)
    for event in ONE_OF_EACH:
        recorder(event)
    recorder.close()
    assert passed == ONE_OF_EACH
    return path


def test_every_event_survives(recording: Path) -> None:
    assert {type(event) for event in ONE_OF_EACH} == set(EVENTS)
    assert [event for _, event in read(recording)] == ONE_OF_EACH


def test_replay_answers_requests_in_order(recording: Path) -> None:
    events: queue.Queue[Event] = queue.Queue()
    engine = ReplayEngine(read(recording), events.put, speed=0)
    engine.start()
    engine.submit(Load("other"))
    for number in (1, 2, 3):
        engine.submit(Reply(number, (Turn("user", "x"),)))
    played = [events.get(timeout=5) for _ in range(10)]
    engine.close()
    assert [type(event).__name__ for event in played] == [
        "Loading", "Downloading", "Loaded", "Prefill", "Text", "Snapshot", "Done", "Text",
        "Stopped", "Failed",
    ]  # fmt: skip
    assert [getattr(event, "request", 0) for event in played[3:]] == [1, 1, 1, 1, 2, 2, 3]
    assert isinstance(played[2], Loaded) and played[2].model == "other"


def test_a_replayed_reply_can_be_stopped(recording: Path) -> None:
    events: queue.Queue[Event] = queue.Queue()
    engine = ReplayEngine([(i * 100.0, e) for i, (_, e) in enumerate(read(recording))], events.put)
    engine.start()
    engine.submit(Reply(1, (Turn("user", "x"),)))
    assert events.get(timeout=5) == Prefill(1, 1, 2, 0)
    engine.stop(1)
    assert events.get(timeout=5) == Stopped(1, "prefill", 0)
    engine.close()


SNAPSHOT = dumped(ONE_OF_EACH[5], 1.0)
WRONG = [
    "[" * 100_000,
    '{"t": 0, "event": "Noted", "text": ' + "[" * 100_000,
    '{"t": NaN, "event": "Noted", "text": "x"}',
    '{"t": 1e999, "event": "Noted", "text": "x"}',
    '{"t": "1", "event": "Noted", "text": "x"}',
    '{"t": 0, "event": ["Noted"], "text": "x"}',
    '{"t": 0, "event": "Noted", "text": 5}',
    '{"t": 0, "event": "Noted", "text": null}',
    '{"t": 0, "event": "Noted", "text": "\\ud800"}',
    '{"t": 0, "event": "Text", "request": "1", "text": "x", "tokens": 1}',
    '{"t": 0, "event": "Failed", "request": 1, "kind": "nosuch", "message": "x"}',
    '{"t": 0, "event": "Failed", "request": 1, "kind": {}, "message": "x"}',
    '{"t": 0, "event": "Prefill", "request": 1, "done": true, "total": 2, "reused": 0}',
    SNAPSHOT.replace('"fp16": 40', '"fp16": 1' + "0" * 400),
    SNAPSHOT.replace('"fp16": 40', '"fp16": 1' + "0" * 5000),
    SNAPSHOT.replace('"speed": 1.5', '"speed": NaN'),
    SNAPSHOT.replace('"speed": 1.5', '"speed": 1' + "0" * 400),
    SNAPSHOT.replace("[6, 4]", "[6, null]"),
    SNAPSHOT.replace("[6, 4]", "7"),
    SNAPSHOT.replace('"compressed": true', '"compressed": 1'),
    SNAPSHOT.replace('"layers": [{', '"layers": [[], {'),
    SNAPSHOT.replace('"codes": 1', '"nosuch": 1'),
]


@pytest.mark.parametrize("text", WRONG)
def test_an_event_of_the_wrong_kind_is_told_before_it_is_played(text: str, tmp_path: Path) -> None:
    """A traceback, or an app that stops in the middle: nesting, 400 digits, NaN, wrong types."""
    assert text != SNAPSHOT
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a recording: line 1 is not an event") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_reply_with_any_ends_of_lines_is_read_again(tmp_path: Path) -> None:
    """Lost: U+2028, U+0085 and form feeds ended a line of the recording."""
    event = Text(1, "one\u2028two\x85three\x0cfour\x1dfive\r\nsix", 1)
    recorder = Recorder(tmp_path / "x.jsonl", lambda event: None)
    recorder(event)
    recorder.close()
    assert [event for _, event in read(tmp_path / "x.jsonl")] == [event]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_recording_on_a_full_disk_ends_and_the_reply_goes_on() -> None:
    """The engine's thread died of it."""
    seen: list[Event] = []
    recorder = Recorder(Path("/dev/full"), seen.append)
    for event in ONE_OF_EACH:
        recorder(event)
    recorder.close()
    assert [event for event in seen if not isinstance(event, Noted)] == ONE_OF_EACH[:-1]
    said = [event.text for event in seen if isinstance(event, Noted)]
    assert said == ["the recording ends here: No space left on device.", "not kept"]


@pytest.mark.parametrize("text", ["{", '{"t": 0, "event": "Nosuch"}', "[]", '{"event": "Text"}'])
def test_what_is_no_recording(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a recording: line 1"):
        read(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the recording"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot write the recording"):
        Recorder(tmp_path / "no" / "folder.jsonl", lambda event: None)
