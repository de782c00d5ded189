"""A model's cache list, as mlx-lm makes and hands it on: the one place that walks it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.sequence import Sequence
from leankv_mlx.policies import Policy
from leankv_mlx.scorers import Scorer


def entries(caches: Iterable[Any]) -> Iterator[Any]:
    """The entries of a cache list, those of mlx-lm's CacheList one by one."""
    for cache in caches:
        children = getattr(cache, "caches", None)
        if children is None:
            yield cache
        else:
            yield from entries(children)


def unite(caches: Iterable[Any]) -> None:
    """Make one sequence of restored caches: what a policy drops it drops with all layers in view.
    Those that another policy or scorer was chosen for are one of their own.

    Args:
        caches: a cache list, in the model's order.
    """
    made: dict[tuple[Policy, Scorer], Sequence] = {}
    for cache in entries(caches):
        if isinstance(cache, CompressedKVCache):
            chosen = cache.config.policy, cache.config.scorer
            if chosen not in made:
                made[chosen] = Sequence(*chosen)
            cache.join(made[chosen])


@dataclass(frozen=True)
class Sequences:
    """What a cache list is of: a sequence of the model, and of its drafting model where mlx-lm has
    both in one list. Caches that were never said to belong together are a sequence each.

    Attributes:
        sequences: each once.
        ours: the compressed caches.
        others: mlx-lm's own caches.
    """

    sequences: tuple[Sequence, ...]
    ours: tuple[CompressedKVCache, ...]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, caches: Iterable[Any]) -> Sequences:
        """Those of a cache list."""
        found = list(entries(caches))
        ours = tuple(cache for cache in found if isinstance(cache, CompressedKVCache))
        others = tuple(cache for cache in found if not isinstance(cache, CompressedKVCache))
        return cls(tuple(dict.fromkeys(cache.sequence for cache in ours)), ours, others)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    @contextmanager
    def reading(self, tokens: float = math.inf, step: int = 1) -> Iterator[None]:
        """Inside of the block the model reads a prompt, see `Sequence.reading`."""
        with ExitStack() as told:
            for sequence in self.sequences:
                told.enter_context(sequence.reading(tokens, step))
            yield

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Count the updates inside as parts of one. What caches hold then depends on where updates
        end and not on where they were cut, and whoever reads a prompt can look up in the middle of
        one.

        Until it ends, the rows of the update are exact rows of all layers, not of one at a time.
        """
        for cache in self.ours:
            cache.begin_parts()
        try:
            yield
        finally:  # one that is left in the middle ends there
            for cache in self.ours:
                cache.end_parts()

    def end_prompt(self) -> None:
        """The whole prompt is in, see `Sequence.end_prompt`."""
        for sequence in self.sequences:
            sequence.end_prompt()

    def narrow(self) -> None:
        """Codes keep only what a mask says from now on, see `Sequence.narrow`."""
        for sequence in self.sequences:
            sequence.narrow()

    def forget_queries(self) -> None:
        """Another prompt begins, see `Sequence.forget_queries`."""
        for sequence in self.sequences:
            sequence.forget_queries()

    def compact(self) -> None:
        """Give up the blocks that copies left behind which have ended, where they are many. A cache
        that goes on does that when it next takes blocks; this is for one that is kept."""
        bodies = [cache.layer.body for cache in self.ours if cache.layer and cache.layer.body]
        pools = {table.pool for body in bodies for table in body.tables if table.pool.wasteful}
        for pool in pools:
            pool.compact()
        mx.eval([pool.array for pool in pools])

    def is_prefix(self, tokens: int) -> bool:
        """Whether the caches can be cut to their first `tokens` tokens for a prompt that begins
        with them, see `Sequence.is_prefix`."""
        ours = all(sequence.is_prefix(tokens) for sequence in self.sequences)
        return ours and self.can_rewind()

    def can_rewind(self) -> bool:
        """Whether the last tokens can be taken back while a model generates."""
        return all(cache.is_trimmable() for cache in self.others)

    def rewind(self, tokens: int) -> int:
        """Take back the last tokens, drafts that were not accepted; returns how many.

        To be called after every verification, for 0 tokens, too: it says that the prompt is in.

        Raises:
            DroppedTokensError: they reach further back than the window, and a policy has dropped
                tokens there. All caches are then as they were.
        """
        if not self.can_rewind():
            return 0
        for sequence in self.sequences:
            sequence.verified(tokens)
        removed = [int(cache.trim(tokens)) for cache in (*self.ours, *self.others)]
        return removed[0] if removed else 0
