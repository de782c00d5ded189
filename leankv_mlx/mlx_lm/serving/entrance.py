"""Who may run next: the requests that wait, for bytes or for what another one is reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from leankv_mlx.mlx_lm.serving.machines import Machines
from leankv_mlx.mlx_lm.serving.request import Request
from leankv_mlx.mlx_lm.serving.running import Running
from leankv_mlx.mlx_lm.serving.served import Served
from leankv_mlx.serving import PromptStore
from leankv_mlx.serving.admission import Balance, Room, Verdict, too_large
from leankv_mlx.serving.sharing import WORTH

_LEAST = 32
"""Tokens in common below which a prompt is read as a whole. Little is saved, and what a cache holds
depends on where reading stopped; so short prompts get the very reply that they get alone."""


class Entrance:
    """The waiting room of one model.

    Args:
        args: of mlx-lm's server.
    """

    def __init__(
        self, served: Served, running: Running, store: PromptStore, machines: Machines, args: Any
    ) -> None:
        self._served, self._running, self._store = served, running, store
        self._machines, self._args = machines, args
        self._room: Room[Request] = Room()
        # Counts of changes: when the store was last held to its limits, when nobody fitted, and
        # when it was last seen where prompts are to stop.
        self._settled = self._futile = self._cut = -1

    def __len__(self) -> int:
        return len(self._room)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._room)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self._room.add(request)
        self._running.changes += 1

    def remove(self, request: Request) -> None:
        """It waits no more; does nothing if it does not wait."""
        self._room.remove(request)

    def check(self, request: Request) -> None:
        """Refuse a request that would wait for ever.

        Raises:
            MemoryLimitError: it takes more than all requests together may.
        """
        tokens = len(request.prompt) + request.max_tokens
        refusal = self._machines.told(lambda: too_large(request.most, self._served.limit, tokens))
        if refusal is not None:
            raise refusal

    def admit(self) -> None:
        """Let all in for whom there is room."""
        while (number := self._machines.told(self._choose)) is not None:
            self._let_in(next(x for x in self._room if x.number == number))
        for uid, places in (self._machines.told(self._cuts) or {}).items():
            self._running.cut(uid, places)
        self.settle()

    def make_room(self, wanted: int, caches: list[Any] | None = None) -> bool:
        """Have the store let go of what was used longest ago until there are `wanted` bytes more;
        False if that would not be enough, and then it lets go of nothing.

        Args:
            caches: that will be held besides.
        """
        balance = self._running.balance(caches)
        if balance.fits(wanted):
            return True
        if not balance.could_fit(wanted):
            return False
        most = balance.limit - balance.growth - wanted
        self._store.trim_to(n_bytes=most, running=[*self._running.lists, caches or []])
        return True

    def settle(self) -> None:
        """Have the store let go of what there is no room for any more, and of the same on all
        machines."""
        if self._settled == self._running.changes:
            return
        self._settled = self._running.changes
        self._store.trim_to(n_sequences=self._machines.told(self._trimmed))

    def _trimmed(self) -> int:
        """Entries that are left once there is room for all that runs to grow."""
        limit, lists = self._served.limit, self._running.lists
        if self._store.nbytes + sum(x.most for x in self._running.requests) > limit:
            growth = self._running.balance(None).growth
            self._store.trim_to(n_bytes=limit - growth, running=lists)
        if self._args.prompt_cache_bytes is not None:
            self._store.trim_to(n_bytes=self._args.prompt_cache_bytes, running=lists)
        return len(self._store)

    def _choose(self) -> int | None:
        """The number of the next to run; it may turn out not to fit."""
        if not self._room or self._futile == self._running.changes or not self._has_place():
            return None
        balance = self._running.balance(None)
        found = self._room.next(lambda request: self._judge(request, balance))
        if found is None:
            self._futile = self._running.changes
            return None
        return found.number

    def _has_place(self) -> bool:
        """Whether mlx-lm's batch would begin with one more at once, and should: a step that reads
        many long prompts holds up all replies, and who leaves, for as long as they take together.
        """
        reading = [request for request, _ in self._running.reading]
        if any(request.by_itself for request in reading):
            return False
        at_once: int = self._args.prompt_concurrency
        most: int = max(self._args.decode_concurrency, at_once)
        step: int = self._args.prefill_step_size
        ahead = sum(min(step, len(request.prompt) - request.tokens) for request in reading)
        return len(self._running) < most and len(reading) < at_once and ahead < step

    def _judge(self, request: Request, balance: Balance) -> Verdict:
        if request.missed == self._running.changes:
            return Verdict.WAITS
        if request.by_itself and self._running.reading:
            return Verdict.HOLDS
        have = self._at_hand(request.prompt)
        if self._holds(request, have):
            return Verdict.HOLDS
        wanted = request.most - self._served.shared(have)
        return Verdict.FITS if balance.could_fit(wanted) else Verdict.WAITS

    def _holds(self, request: Request, have: int) -> bool:
        """Whether a request waits for what another one reads, which then stops there."""
        for _, reading in self._running.reading:
            cut = reading.cut_for(request.prompt, have)
            if cut is not None:
                reading.add(cut)
                return True
        return False

    def _let_in(self, request: Request) -> None:
        """Let a request run if it fits with what the store really has of its prompt."""
        caches, request.reused = self._beginning(request.prompt)
        # Each machine has its own heads or layers, from whose scores a policy may have dropped
        # tokens on one and not on another.
        if not self._machines.agree(request.reused):
            caches, request.reused = None, 0
        wanted = request.most - self._served.shared(request.reused)
        if not self._machines.told(lambda: self.make_room(wanted, caches)):
            if self._running:
                request.missed = self._running.changes
                return
            # It fits beside nothing else, just not beside what it would go on from.
            caches, request.reused = None, 0
            self._machines.told(lambda: self.make_room(request.most))
        self._room.start(request)
        try:
            self._running.start(request, caches)
        except Exception as error:
            self._running.fail([request], error)
        self.settle()

    def _beginning(self, prompt: list[int]) -> tuple[list[Any] | None, int]:
        """Caches with what is at hand of a prompt, and how many tokens these are."""
        stored = self._stored(prompt)
        source, length = self._running.nearest(prompt)
        if source is not None and length >= stored + WORTH:
            self._running.keep(source, "user", whole=True)
            stored = self._stored(prompt)  # unless it cannot be cut
        if stored < _LEAST:
            self._store.misses += 1
            return None, 0
        caches, rest = self._store.fetch_nearest_cache(self._served.key, prompt)
        return caches, len(prompt) - len(rest)

    def _stored(self, prompt: list[int]) -> int:
        return self._store.longest(self._served.key, prompt)

    def _at_hand(self, prompt: list[int]) -> int:
        """Tokens of a prompt that the store or somebody who runs has."""
        return max(self._stored(prompt), self._running.nearest(prompt)[1])

    def _cuts(self) -> dict[int, list[int]] | None:
        """Where prompts stop because others go on from there, also those there is no place for
        yet."""
        if self._cut == self._running.changes or not self._running.reading:
            return None
        self._cut = self._running.changes
        for request in self._room:
            self._holds(request, self._at_hand(request.prompt))
        wanted = {x.uid: sorted(reading.cuts) for x, reading in self._running.reading}
        return {uid: places for uid, places in wanted.items() if places} or None
