"""The engine's thread.

Lazy arrays belong to the thread that made them, so one thread does everything that touches mlx,
its import included: whoever starts the engine stays responsive from the first moment. So do
streams: what a thread leaves of them aborts the process at its end now and then.
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import TYPE_CHECKING

from leankv_mlx.engine.events import Event, Failed, Stopped
from leankv_mlx.engine.requests import Cancelled, Emit, Load, Read, Reply, Request
from leankv_mlx.faults import described

if TYPE_CHECKING:
    from leankv_mlx.engine.worker import Worker

_SNAPSHOT_SECONDS = 0.25


class Engine:
    """Serves requests one after the other in a thread of its own.

    Args:
        emit: receives every event, in the engine's thread.
        snapshot_seconds: time between two snapshots of the cache during a reply.
    """

    def __init__(self, emit: Emit, snapshot_seconds: float = _SNAPSHOT_SECONDS) -> None:
        self._emit = emit
        self._snapshot_seconds = snapshot_seconds
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        # Loads that were asked for, served and stopped so far: they are served in order.
        self._loads = self._loading = self._stopped_loads = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leankv-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve requests."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Serve a request after those before it."""
        self._loads += isinstance(request, Load)
        self._requests.put(request)

    def stop(self, request: int) -> None:
        """Stop a reply, running or waiting; a reply that has ended is left as it is. 0 stops the
        downloads and conversions of all loads that were asked for so far."""
        if request:
            self._stopped.add(request)
        else:
            self._stopped_loads = self._loads

    def close(self, timeout: float = 10.0) -> None:
        """Stop everything and wait for the thread; no event comes after this returns in time."""
        self._closing.set()
        self._requests.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def cancelled(self, request: int) -> bool:
        """Whether a reply (0: the load being served) should end."""
        if self._closing.is_set():
            return True
        return request in self._stopped if request else self._loading <= self._stopped_loads

    def check(self, request: int) -> None:
        """Raise `Cancelled` if a reply (0: the load being served) should end."""
        if self.cancelled(request):
            raise Cancelled

    def emit(self, event: Event) -> None:
        """Tell an event."""
        if not self._closing.is_set():
            self._emit(event)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            if "mlx.core" in sys.modules:
                sys.modules["mlx.core"].clear_streams()

    def _serve(self) -> None:
        worker: Worker | None = None
        while (request := self._requests.get()) is not None and not self._closing.is_set():
            self._loading += isinstance(request, Load)
            try:
                if worker is None:
                    from leankv_mlx.engine.worker import Worker  # mlx is imported here

                    worker = Worker(self, self._snapshot_seconds)
                worker.serve(request)
            except Cancelled:
                if isinstance(request, Load):
                    self.emit(Stopped(0, "load", 0))
            except BaseException as error:  # a thread that ended would leave its user waiting
                self.emit(_failure(request, error))
        if worker is not None:
            worker.close()


def _failure(request: Request, error: BaseException) -> Failed:
    text = described(error)
    if isinstance(error, ImportError):
        text = f"mlx does not import ({text}); on Linux install the extra cpu or cuda13."
    if isinstance(request, Reply | Read):
        return Failed(request.request, "reply", text)
    return Failed(0, "load" if isinstance(request, Load) else "kv", text)
