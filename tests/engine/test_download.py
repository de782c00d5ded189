"""A model that is not here yet: the hub client's progress becomes events."""

from __future__ import annotations

import queue
from errno import ENOSPC
from typing import Any

import huggingface_hub
import pytest

from leankv_mlx.engine import Engine
from leankv_mlx.engine.download import progress_class
from leankv_mlx.engine.events import Downloading, Event, Failed, Loaded
from leankv_mlx.engine.requests import Cancelled, Load
from leankv_mlx.resources import demo_model


def events_of(load: Load, last: type[Event]) -> list[Event]:
    events: queue.Queue[Event] = queue.Queue()
    engine = Engine(events.put)
    engine.start()
    engine.submit(load)
    found = [events.get(timeout=60)]
    while not isinstance(found[-1], last):
        found.append(events.get(timeout=60))
    engine.close()
    return found


def test_bytes_are_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def download(*args: Any, tqdm_class: Any, **options: Any) -> str:
        files = tqdm_class(total=3, desc="Fetching 3 files")
        with tqdm_class(total=0, unit="B", name="huggingface_hub.x") as size:
            size.total = 100
            for part in (40, 60):
                size.update(part)
            files.update(3)
        return str(demo_model())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = events_of(Load("owner/name"), Loaded)
    told = [event for event in found if isinstance(event, Downloading)]
    assert told[0] == Downloading("owner/name", 40, 100)
    assert told[-1] == Downloading("owner/name", 100, 100)
    assert isinstance(found[-1], Loaded)
    assert found[-1].name == "name"
    out, err = capfd.readouterr()
    assert "Fetching" not in out + err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(ENOSPC, "No space left on device"), "the disk is full"),
        (OSError("Connection reset"), "run it again to continue"),
    ],
)
def test_a_download_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    failed = events_of(Load("owner/name"), Failed)[-1]
    assert isinstance(failed, Failed)
    assert text in failed.message


def test_a_download_can_be_ended() -> None:
    def check() -> None:
        raise Cancelled

    bar = progress_class("m", lambda event: None, check)(total=10, unit="B")
    with pytest.raises(Cancelled):
        bar.update(1)
