"""Prefixes of prompts on disk: what two prompts began with is there after a restart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy, deepcopy
from functools import cached_property
from typing import Any

import mlx.core as mx

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.serving.entries import Entries, alike
from leankv_mlx.serving.keys import Key, Reading

WORTH = 64
"""Tokens that an entry must save at least: fewer are as soon read as opened."""
_GROWTH = 4
"""What is stored already is stored again, longer, once a quarter is new: a conversation that grows
by turns is then written a few times, and not at every turn."""


class Prefixes:
    """The entries that one model with one setting can open, and the making of new ones.

    A new one is written in a thread of its own, one at a time: waiting for the disk would hold up
    everything that is being generated. What comes meanwhile is not written; it may come again.

    Args:
        entries: the folder.
        reading: how the model that is loaded reads tokens.
        model: what to call it in lists.
        fresh: makes caches such as the model makes now, which know their shapes.
    """

    def __init__(
        self,
        entries: Entries,
        reading: Reading,
        model: str,
        fresh: Callable[[], Sequence[Any]],
    ) -> None:
        self.entries = entries
        self._reading = reading
        self._model = model
        self._make_fresh = fresh
        self._writer: threading.Thread | None = None

    def longest(self, tokens: Sequence[int], above: int) -> int:
        """How many of these tokens the longest stored prefix has that is worth opening if `above`
        of them are at hand; 0 if none is."""
        return self.entries.longest(self._reading, tokens, above + WORTH - 1)

    def open(self, tokens: Sequence[int]) -> list[Any] | None:
        """The caches of a stored prefix, of just these tokens; None if they cannot be had."""
        return self.entries.load(self._key(tokens), _called(tokens), self._fresh)

    def keep(self, tokens: Sequence[int], caches: Sequence[Any]) -> None:
        """Two prompts began with these tokens, and the caches hold them: write them, unless what
        is stored serves as well. The caches are evaluated and otherwise left as they are."""
        if self._busy or not self.entries.limit or not alike(caches, self._fresh):
            return
        stored = self.entries.longest(self._reading, tokens)
        if stored:
            self.entries.touch(self._key(tokens[:stored]))
        if len(tokens) - stored < max(WORTH, len(tokens) // _GROWTH):
            return
        snapshot = [_snapshot(cache) for cache in caches]
        mx.eval([cache.state for cache in snapshot])
        writer = threading.Thread(
            target=self._write, args=(self._key(tokens), snapshot), name="leankv-prefix"
        )
        with suppress(RuntimeError):  # no thread can be started: it may come again
            writer.start()
            self._writer = writer

    def close(self) -> None:
        """Wait for what is being written."""
        if self._writer is not None:
            self._writer.join()

    @property
    def _busy(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    @cached_property
    def _fresh(self) -> Sequence[Any]:
        return self._make_fresh()

    def _key(self, tokens: Sequence[int]) -> Key:
        reading = self._reading
        return Key(reading.model, reading.kv, tuple(tokens), reading.chunk)

    def _write(self, key: Key, caches: list[Any]) -> None:
        try:
            self.entries.save(key, _called(key.prefix), self._model, caches, document=False)
        finally:
            mx.clear_streams()


def _called(tokens: Sequence[int]) -> str:
    return f"a prefix of {len(tokens):,} tokens"


def _snapshot(cache: Any) -> Any:
    """A copy that another thread can read: it shares arrays, and nothing that the thread that runs
    the models goes on with. A pool is such a thing; its array is replaced and never changed."""
    if isinstance(cache, CompressedKVCache):
        return CompressedKVCache.from_state(cache.state)
    children = getattr(cache, "caches", None)
    if children is None:
        return deepcopy(cache)
    other = copy(cache)
    other.caches = type(children)(map(_snapshot, children))
    return other
