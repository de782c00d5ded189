"""The end of the engine's thread."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest

from tests.engine.test_engine import Driver  # isort: skip

from leankv_mlx.engine.events import Failed, Loaded
from leankv_mlx.engine.requests import Forget, Load

RUN = """
import queue
from leankv_mlx.engine import Engine
from leankv_mlx.engine.events import Done
from leankv_mlx.engine.requests import Load, Reply, Turn
events = queue.Queue()
engine = Engine(events.put)
engine.start()
engine.submit(Load())
engine.submit(Reply(1, (Turn("user", "The code is 5. What is the code?"),), max_tokens=4))
while not isinstance(events.get(timeout=100), Done):
    pass
engine.close()
"""


def test_the_thread_clears_its_streams_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a thread that used mlx ends with streams of its own: the process aborts at exit."""
    cleared: list[str] = []
    original = mx.clear_streams

    def clear() -> None:
        import threading

        cleared.append(threading.current_thread().name)
        original()

    monkeypatch.setattr(mx, "clear_streams", clear)
    driver = Driver()
    driver.engine.submit(Load())
    driver.wait(Loaded)
    assert cleared == []
    driver.engine.close()
    assert cleared == ["leankv-engine"]


@pytest.mark.slow
def test_eight_short_runs_end_well() -> None:
    """Kind: as above; 7 of 8 such runs ended with "terminate called"."""
    for _ in range(8):
        ran = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


def test_nothing_ends_the_thread_before_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a library that exits, or runs out of memory, leaves the chat waiting for ever."""
    from leankv_mlx.engine.worker import Worker

    serve = Worker.serve

    def broken(self: Any, request: Any) -> None:
        if isinstance(request, Forget):
            raise SystemExit(3)
        serve(self, request)

    monkeypatch.setattr(Worker, "serve", broken)
    driver = Driver()
    driver.engine.submit(Forget())
    event = driver._queue.get(timeout=60)
    assert isinstance(event, Failed)
    assert "SystemExit: 3 (the traceback is in" in event.message
    driver.engine.submit(Load())
    driver.wait(Loaded)
    driver.engine.close()
