"""The prompt store: what it finds is what a list of all entries would find, and what it counts is
what the buffers hold."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count

import pytest

from leankv_mlx.mlx_lm.prompts import shared
from leankv_mlx.serving import PromptStore
from leankv_mlx.serving.prompts import KINDS

_NAMES = count()


class Told:
    """A cache that holds token ids and does what it is told; one that is `whole` is never cut."""

    nbytes = 10

    def __init__(self, tokens: list[int], whole: bool = False) -> None:
        self.tokens, self.whole, self.name = tokens, whole, next(_NAMES)

    def __deepcopy__(self, memo: object) -> Told:
        other = Told(self.tokens, self.whole)
        other.name = self.name
        return other

    def is_trimmable(self) -> bool:
        return not self.whole

    def trim(self, n: int) -> int:
        assert not self.whole and 0 < n < len(self.tokens)
        self.tokens = self.tokens[:-n]
        return n


@dataclass(frozen=True)
class Kept:
    model: str
    tokens: list[int]
    whole: bool
    kind: str
    name: int


class Naive:
    """The same store as a list, the least recently used first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: list[Kept] = []

    def serves(self, entry: Kept, model: str, tokens: list[int]) -> int:
        common = min(shared(entry.tokens, tokens), len(tokens) - 1)
        usable = entry.model == model and (common == len(entry.tokens) or not entry.whole)
        return common if usable else 0

    def longest(self, model: str, tokens: list[int]) -> int:
        return max((self.serves(entry, model, tokens) for entry in self.entries), default=0)

    def touch(self, name: int) -> Kept:
        entry = next(entry for entry in self.entries if entry.name == name)
        self.entries.remove(entry)
        self.entries.append(entry)
        return entry

    def insert(self, new: Kept) -> None:
        def stays(old: Kept) -> bool:
            return old.model != new.model or (
                old.tokens != new.tokens
                and (new.whole or old.tokens != new.tokens[: len(old.tokens)])
            )

        self.entries = [*filter(stays, self.entries), new]
        while len(self.entries) > self.size:
            self.entries.remove(self.oldest())

    def oldest(self) -> Kept:
        a, b, c = ([e for e in self.entries if e.kind == kind] for kind in KINDS)
        if a and len(a) >= len(b):
            return a[0]
        return b[0] if b and len(b) >= len(c) else c[0]


@pytest.mark.parametrize(("seed", "size"), [(1, 1), (2, 3), (3, 12), (4, 12), (5, 1000)])
def test_it_finds_what_a_list_of_all_entries_finds(seed: int, size: int) -> None:
    rng = random.Random(seed)
    store, naive = PromptStore(size), Naive(size)
    spoken: list[list[int]] = [[1]]

    def prompt() -> list[int]:
        start = rng.choice(spoken)
        tokens = start[: rng.randrange(len(start) + 1)]
        tokens = tokens + [rng.randrange(3) for _ in range(rng.randrange(1, 7))]
        spoken[len(spoken) % 40 :] = [tokens]
        return tokens

    for _ in range(800):
        model, tokens = rng.choice("ab"), prompt()
        expected = naive.longest(model, tokens)
        assert store.longest(model, tokens) == expected
        if rng.random() < 0.6:
            caches, rest = store.fetch_nearest_cache(model, tokens)
            assert list(rest) == tokens[expected:] and len(rest) > 0
            assert (caches is None) == (expected == 0)
            if caches is not None:
                assert caches[0].tokens == tokens[:expected]
                assert naive.serves(naive.touch(caches[0].name), model, tokens) == expected
        else:
            cache, kind = Told(tokens, rng.random() < 0.3), rng.choice(KINDS)
            store.insert_cache(model, tokens, [cache], cache_type=kind)
            naive.insert(Kept(model, tokens, cache.whole, kind, cache.name))
        assert sorted(caches[0].name for caches in store.lists) == sorted(
            entry.name for entry in naive.entries
        )
        assert store.nbytes == 10 * len(store) == 10 * len(naive.entries)
    store.trim_to(n_sequences=0)
    assert not store._trees and store.nbytes == 0 == len(store)
