"""The loop of a server's generation thread: what it hears, what it takes, and in which order.

On several machines each runs it, and all must decide alike and call each other in the same order.
What only the first one knows is told before anything is done about it: which requests came and
which clients left (`_hear`), who fits and what the store lets go of (`Entrance`). All else follows
from tokens, which are the same everywhere.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any

import mlx.core as mx

from leankv_mlx.errors import LeanKVError, ServingError
from leankv_mlx.faults import described
from leankv_mlx.mlx_lm.serving.client import Client
from leankv_mlx.mlx_lm.serving.entrance import Entrance
from leankv_mlx.mlx_lm.serving.machines import Machines
from leankv_mlx.mlx_lm.serving.report import Report
from leankv_mlx.mlx_lm.serving.request import Arrival, Request, prepare
from leankv_mlx.mlx_lm.serving.running import Running
from leankv_mlx.mlx_lm.serving.served import Served
from leankv_mlx.serving import Held, PromptStore

_IDLE_S = 0.1
"""How long to wait for a request while nothing runs."""


@dataclass(frozen=True)
class _News:
    """What the first machine tells the others.

    Attributes:
        arrived: mlx-lm's request and arguments of each.
        left: numbers of requests nobody waits for any more.
        stop: the server ends.
    """

    arrived: list[tuple[Any, Any]]
    left: list[int]
    stop: bool


class Loop:
    """The life of a generation thread.

    Args:
        generator: mlx-lm's `ResponseGenerator`.
        serve: makes `Served` of what a `ModelProvider` has loaded, by the name asked for.
        summary: the line of the log about the caches of a request that was answered.
    """

    def __init__(
        self,
        generator: Any,
        store: PromptStore,
        report: Report,
        serve: Callable[[Any, Any], Served],
        summary: Callable[[list[Any]], str],
    ) -> None:
        self._generator, self._store, self._report = generator, store, report
        self._serve, self._summary = serve, summary
        self._machines = Machines(generator)
        self._stream = mx.default_stream(mx.default_device())
        self._arrivals: deque[Arrival] = deque()
        self._arrived = 0
        self._served: Served | None = None
        self._running: Running
        self._entrance: Entrance
        self._looked = -1  # the count of changes at the last look
        report.look(Held(), running=0, waiting=0, store=store)

    def run(self) -> None:
        """Until the server ends."""
        while self._hear():
            try:
                self._take()
                if self._served is not None:
                    self._entrance.admit()
                    self._advance()
                    self._look()
            except Exception as error:
                self._fail_all(error)
        self._let_go_of_model()

    def open(self, name: Any) -> Served:
        """Have the model that is asked for by a name.

        Args:
            name: mlx-lm's `ModelDescription` of it.

        Raises:
            Exception: it cannot be loaded, see `loading.load_from`.
        """
        if self._served is not None and self._served.name == name:
            return self._served
        self._let_go_of_model()
        provider = self._generator.model_provider
        provider.load(name.model, name.adapter, name.draft)
        served = self._serve(name, provider)
        self._running = Running(
            served, self._store, self._generator, self._report.counts, self._summary
        )
        self._entrance = Entrance(
            served, self._running, self._store, self._machines, self._generator.cli_args
        )
        self._served, self._store.disk = served, served.disk
        self._report.facts = served.facts
        self._looked = -1
        return served

    def _let_go_of_model(self) -> None:
        """Refer to the model no more, so that another one has its memory."""
        if self._served is not None:
            self._running.close()
            if self._served.disk is not None:
                self._served.disk.close()
            del self._running, self._entrance
        self._served = self._store.disk = None

    # What it hears.

    def _hear(self) -> bool:
        """New requests, and those nobody waits for any more; False at the end."""
        clients: list[Client] = []

        def find() -> _News | None:
            found = self._gather()
            clients.extend(client for client, _, _ in found)
            left = [request.number for request in self._known() if request.client.left]
            stop = self._generator._stop
            arrived = [(request, args) for _, request, args in found]
            return _News(arrived, left, stop) if arrived or left or stop else None

        news = self._machines.told(find)
        if news is None:
            return True
        for place, (request, args) in enumerate(news.arrived):
            client = clients[place] if clients else Client()
            self._arrivals.append(Arrival(self._arrived, client, request, args))
            self._arrived += 1
        self._drop([request for request in self._known() if request.number in news.left])
        return not news.stop

    def _gather(self) -> list[Any]:
        """What has come; waits a moment where there is nothing else to do."""
        found = []
        try:
            if not self._busy:
                found.append(self._generator.requests.get(timeout=_IDLE_S))
            while True:
                found.append(self._generator.requests.get_nowait())
        except Empty:
            return found

    @property
    def _busy(self) -> bool:
        return self._served is not None and bool(self._running or self._entrance)

    def _known(self) -> list[Any]:
        """Arrivals and requests that are not answered yet."""
        inside = [*self._entrance, *self._running.requests] if self._served is not None else []
        return [*self._arrivals, *inside]

    def _drop(self, requests: list[Any]) -> None:
        if not requests:
            return
        self._report.counts.left += len(requests)
        self._arrivals = deque(x for x in self._arrivals if x not in requests)
        if self._served is not None:
            for request in requests:
                self._entrance.remove(request)
            self._running.leave(x for x in requests if isinstance(x, Request))
            self._running.changes += 1

    # What it takes.

    def _take(self) -> None:
        """Take arrivals, in their order. One for another model, or one that is answered by itself,
        waits until nothing else runs, and those behind it wait with it."""
        while self._arrivals:
            arrival = self._arrivals[0]
            if self._busy and not (self._is_current(arrival) and self._goes_with_others(arrival)):
                return
            self._arrivals.popleft()
            try:
                self.open(arrival.args.model)
                self._enter(arrival)
            except Exception as error:  # of the hub, of files, of what the client sent
                arrival.client.put(error)

    def _is_current(self, arrival: Arrival) -> bool:
        return self._served is not None and self._served.name == arrival.args.model

    def _goes_with_others(self, arrival: Arrival) -> bool:
        """Whether mlx-lm answers it in a batch: no drafts, no seed, no images."""
        try:
            images = any(self._generator.server._image_parts(arrival.request.messages))
        except Exception:  # messages that are none: what is wrong is said when they become tokens
            images = False
        return bool(self._generator._is_batchable(arrival.args)) and not images

    def _enter(self, arrival: Arrival) -> None:
        """Check a request, and let it wait for its turn or answer it now.

        Raises:
            RequestError, ContextLengthError: see `prepare` and `Entrance.check`.
        """
        assert self._served is not None
        together = self._goes_with_others(arrival)
        # mlx-lm changes messages when it makes tokens of them.
        copied = arrival if together else replace(arrival, request=deepcopy(arrival.request))
        request = prepare(copied, self._generator, self._served)
        self._entrance.check(request)
        if together:
            arrival.client.put(request.context)
            self._entrance.add(request)
        else:
            self._answer(arrival, request)

    def _answer(self, arrival: Arrival, request: Request) -> None:
        """Answer a request by itself, in mlx-lm's own loop, which puts errors into the queue."""
        self._machines.told(lambda: self._entrance.make_room(request.most))
        self._entrance.settle()
        # Its loop is left by an error; on one of several machines it cannot be left.
        arrival.client.kept = self._machines.several
        arrival.client.strict = not self._machines.several
        arrival.args.max_tokens = request.max_tokens
        self._generator._serve_single((arrival.client, arrival.request, arrival.args), self._stream)
        self._report.counts.finished += 1
        self._running.changes += 1

    # What it does.

    def _advance(self) -> None:
        """Steps of the batch, until something else is to be done."""
        if not self._running:
            return
        for _ in self._generator._time_budget:
            try:
                again = self._running.step()
            except Exception as error:
                self._running.start_anew(error)
                if self._machines.several:
                    raise
                return
            for request in again:
                self._entrance.add(request)
            self._entrance.settle()
            if not self._running or (not self._machines.several and self._is_called()):
                return

    def _is_called(self) -> bool:
        """Whether there is news; several machines hear of it after the same number of steps."""
        left = any(request.client.left for request in self._running.requests)
        return left or not self._generator.requests.empty() or self._report.is_due()

    def _is_to_look(self) -> bool:
        """Once a second while anything changes."""
        if self._looked == self._running.changes and not self._running:
            return False
        return self._report.is_due() or not self._busy

    def _look(self) -> None:
        """Note what all machines hold, when the first one thinks that it is time."""
        if not self._machines.told(self._is_to_look):
            return
        self._looked = self._running.changes
        self._store.compact()
        waiting = len(self._entrance) + len(self._arrivals)
        held = self._machines.total(self._store.held(self._running.lists))
        self._report.look(held, len(self._running), waiting, self._store)
        if (line := self._report.line()) is not None:
            logging.info(line)

    def _fail_all(self, error: Exception) -> None:
        """Something went wrong that no request can be blamed for: none of them waits for ever.

        Raises:
            Exception: the error, on several machines: they may no longer be of one mind.
        """
        text = described(error)
        logging.error(f"leankv: error: {text}")
        for request in self._known():
            request.client.put(error if isinstance(error, LeanKVError) else ServingError(text))
        self._arrivals.clear()
        if self._served is not None:
            for request in self._entrance:
                self._entrance.remove(request)
            self._running.start_anew(error)
        if self._machines.several:
            raise error
