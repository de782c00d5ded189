"""`PromptStore`: the prompts that were read before, in memory, for those that begin like them.

It stands where mlx-lm's server has its `LRUPromptCache`, and asks the same of a cache list: a deep
copy, `is_trimmable` and `trim`. What is different is what it counts. Copies of our caches share
blocks, so two prompts with a common beginning hold it once, and the limit means that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from leankv_mlx.cache import Sequences
from leankv_mlx.serving.held import Held, Ledger, Share
from leankv_mlx.serving.tree import Node, Tree, as_tokens

KINDS = ("assistant", "user", "system")
"""What an entry ends with, the first to go first."""


class Disk(Protocol):
    """Where prefixes survive a restart."""

    def longest(self, tokens: Sequence[int], above: int) -> int:
        """How many of these tokens the longest stored prefix has that has more than `above` of
        them; 0 if none has."""

    def open(self, tokens: Sequence[int]) -> list[Any] | None:
        """The caches of a stored prefix, of just these tokens; None if they cannot be had."""

    def keep(self, tokens: Sequence[int], caches: list[Any]) -> None:
        """Two prompts began with these tokens, and the caches hold them. They may be kept; they
        are not changed."""


@dataclass(eq=False, slots=True)
class _Entry:
    """A sequence that is kept.

    Attributes:
        model: it was read by.
        caches: its own; copies are handed out.
        kind: one of `KINDS`.
        share, by_kind: what it counts as, among all and among those of its kind.
        node: its place among those of the model.
    """

    model: Hashable
    caches: list[Any]
    kind: str
    share: Share
    by_kind: Share
    node: Node[_Entry] | None = None


class PromptStore:
    """Caches of prompts, found by the tokens that they have in common with another one.

    To be used by one thread, the one that runs the models.

    Args:
        max_size: sequences that are kept.
        max_bytes: that they may use, shared ones counted once.
        disk: of the model that answers now; whoever loads another one replaces it.

    Attributes:
        hits, misses: prompts for which something was, or was not, found.
        reused: tokens that were not read again.
    """

    def __init__(
        self, max_size: int = 10, max_bytes: int = 1 << 63, disk: Disk | None = None
    ) -> None:
        self.max_size, self.max_bytes, self.disk = max_size, max_bytes, disk
        self.hits = self.misses = self.reused = 0
        self._trees: dict[Hashable, Tree[_Entry]] = {}
        # The least recently used of each kind first.
        self._queues: dict[str, OrderedDict[int, _Entry]] = {k: OrderedDict() for k in KINDS}
        self._ledger = Ledger()
        self._by_kind = {kind: Ledger() for kind in KINDS}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def nbytes(self) -> int:
        """Bytes in use, shared ones counted once."""
        return self._ledger.used

    @property
    def lists(self) -> list[list[Any]]:
        """The caches of all entries, not to be changed."""
        return [entry.caches for queue in self._queues.values() for entry in queue.values()]

    def held(self, running: Iterable[Sequence[Any]] = ()) -> Held:
        """What the entries hold together with what runs, shared bytes counted once."""
        with self._beside(running):
            return self._ledger.held

    def longest(self, model: Hashable, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt `fetch_nearest_cache` would find; nothing is copied."""
        found = self._nearest(model, tokens)
        count = found[1] if found else 0
        return max(count, self._on_disk(tokens[:-1], count))

    def fetch_nearest_cache(
        self, model: Hashable, tokens: Sequence[int]
    ) -> tuple[list[Any] | None, Sequence[int]]:
        """Caches that hold as much of a prompt's beginning as is known, and the rest of it, at
        least one token. The caches are the caller's own; they share their blocks."""
        found = self._nearest(model, tokens)
        count = found[1] if found else 0
        if (opened := self._opened(model, tokens, count)) is not None:
            return opened
        if found is None:
            self.misses += 1
            return None, tokens
        entry = found[0]
        self._queues[entry.kind].move_to_end(id(entry))
        caches = deepcopy(entry.caches)
        assert entry.node is not None
        if (surplus := entry.node.depth - count) > 0:
            for cache in caches:
                cache.trim(surplus)
        if self.disk is not None:
            self.disk.keep(tokens[:count], caches)
        return self._hit(caches, tokens, count)

    def insert_cache(
        self,
        model: Hashable,
        tokens: Sequence[int],
        caches: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep the caches of a sequence, which are the store's from now on. Others that are a
        beginning of it go if they are of no further use.

        Args:
            tokens: that the caches hold.
            cache_type: one of `KINDS`.
        """
        if not len(tokens):
            return
        # Which tokens stayed in a cache that has dropped some was chosen by all of them, so it is
        # never cut for a prompt that goes on in another way.
        whole = not all(cache.is_trimmable() for cache in caches)
        share = self._ledger.add(caches)
        entry = _Entry(model, caches, cache_type, share, self._by_kind[cache_type].add(caches))
        tree = self._trees.setdefault(model, Tree())
        entry.node, before = tree.put(as_tokens(tokens), entry, whole)
        if before is not None:
            self._forget(before)
        self._queues[cache_type][id(entry)] = entry
        shorter = [] if whole else [node.value for node in entry.node.upward() if node.value]
        for other in shorter[1:]:
            self._remove(other)
        self.trim_to(n_sequences=self.max_size, n_bytes=self.max_bytes)

    def trim_to(
        self,
        *,
        n_sequences: int | None = None,
        n_bytes: int | None = None,
        running: Iterable[Sequence[Any]] = (),
    ) -> None:
        """Let the least recently used go until no more is kept than this.

        Args:
            n_bytes: of the entries and of what runs together, shared ones counted once.
            running: cache lists of what runs.
        """
        while n_sequences is not None and len(self) > max(0, n_sequences):
            self._remove(self._oldest())
        if n_bytes is None:
            return
        with self._beside(running):
            while self.nbytes > max(0, n_bytes) and len(self):
                self._remove(self._oldest())

    def compact(self) -> None:
        """Give up what copies of entries left in their pools when they ended."""
        for caches in self.lists:
            Sequences.of(caches).compact()

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Sequences and bytes of each kind; what kinds share counts in each of them."""
        return {
            kind: {"n_sequences": len(queue), "n_bytes": self._by_kind[kind].used}
            for kind, queue in self._queues.items()
        }

    @contextmanager
    def _beside(self, running: Iterable[Sequence[Any]]) -> Iterator[None]:
        """Other cache lists are counted, too, inside of the block."""
        shares = [self._ledger.add(caches) for caches in running]
        try:
            yield
        finally:
            for share in shares:
                self._ledger.remove(share)

    def _nearest(self, model: Hashable, tokens: Sequence[int]) -> tuple[_Entry, int] | None:
        tree = self._trees.get(model)
        return tree.nearest(as_tokens(tokens), len(tokens) - 1) if tree else None

    def _on_disk(self, tokens: Sequence[int], above: int) -> int:
        return self.disk.longest(tokens, above) if self.disk else 0

    def _opened(
        self, model: Hashable, tokens: Sequence[int], above: int
    ) -> tuple[list[Any], Sequence[int]] | None:
        """What is found on disk, if that is more than what is in memory."""
        stored = self._on_disk(tokens[:-1], above)
        while stored and self.disk:
            if (caches := self.disk.open(tokens[:stored])) is not None:
                copies = deepcopy(caches)
                self.insert_cache(model, tokens[:stored], caches, cache_type="user")
                return self._hit(copies, tokens, stored)
            stored = self._on_disk(tokens[: stored - 1], above)  # it was damaged, or has gone
        return None

    def _hit(
        self, caches: list[Any], tokens: Sequence[int], count: int
    ) -> tuple[list[Any], Sequence[int]]:
        self.hits += 1
        self.reused += count
        return caches, tokens[count:]

    def _oldest(self) -> _Entry:
        """The next to go: of the first kind that has not fewer than the next one, as mlx-lm has
        it."""
        queues = list(self._queues.values())
        for queue, following in pairwise(queues):
            if queue and len(queue) >= len(following):
                return next(iter(queue.values()))
        return next(iter(queues[-1].values()))

    def _remove(self, entry: _Entry) -> None:
        tree = self._trees[entry.model]
        assert entry.node is not None
        tree.take(entry.node)
        if not tree:
            del self._trees[entry.model]
        self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        """Count it no more."""
        del self._queues[entry.kind][id(entry)]
        self._ledger.remove(entry.share)
        self._by_kind[entry.kind].remove(entry.by_kind)
