"""Random walks over sequences, blocks and batch verbs: nothing is lost, leaked or seen by another.

What each sequence should hold is what caches that live alone hold after the same updates, bit for
bit: the history of a sequence is played again in fresh ones. After every step each block must have
as many references as living tables name it, without the help of the garbage collector.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from leankv_mlx.blocks import BlockPool
from leankv_mlx.cache import BatchedKVCache, CompressedKVCache, Sequence, Sequences, owner_of
from leankv_mlx.codec.channels import Channels
from leankv_mlx.config import CompressionConfig
from tests.bases import basis
from tests.blocks.owners import check_owners

LAYERS, H, G, DIM, CHUNK = 2, 2, 2, 32, 48
LEAN = "leankv:policy=threshold,low=k3v2,window=32,alpha_high=2,alpha_low=1"
KEPT = Channels((tuple(range(DIM)), tuple(reversed(range(DIM)))), (0, 1))
TURNED = basis(H, DIM)
Caches = list[Any]


@dataclass(frozen=True)
class Step:
    """What happened to a sequence: "read", "reply", "take" or "trim", `size` tokens of random rows
    made from `seed`; and what attention gave for each layer."""

    kind: str
    size: int = 0
    seed: int = 0
    out: tuple[NDArray[Any], ...] = ()

    def rows(self, layer: int) -> list[NDArray[np.float32]]:
        """Queries, keys and values of a layer, [heads, size, DIM]."""
        rng = np.random.default_rng([self.seed, layer])
        shape = (H * G + 2 * H, self.size, DIM)
        found = rng.standard_normal(shape, np.float32)
        return [found[: H * G], found[H * G : -H], found[-H:]]


@dataclass
class Kept:
    """Caches of one sequence or of a batch, and the history of each row."""

    caches: Caches
    histories: list[list[Step]]

    @property
    def is_batch(self) -> bool:
        return isinstance(self.caches[0], BatchedKVCache)

    @property
    def is_full(self) -> bool:
        """Whether a row has come so far that playing it again takes long."""
        return any(sum(step.size for step in history) > 400 for history in self.histories)

    def lists(self) -> list[Caches]:
        """The caches of each row."""
        if not self.is_batch:
            return [self.caches]
        return [[cache.rows[i] for cache in self.caches] for i in range(len(self.histories))]


def fresh(kv: str) -> Caches:
    """Caches of one new sequence."""
    config = CompressionConfig.parse(kv)
    sequence = Sequence(config.policy, config.scorer)
    learned = KEPT if config.mask else TURNED if config.basis else None
    return [CompressedKVCache(config, sequence=sequence, learned=learned) for _ in range(LAYERS)]


def attended(cache: Any, arrays: Iterable[NDArray[np.float32]]) -> mx.array:
    """One update of a layer and its attention: queries, keys and values [B, heads, L, DIM]."""
    q, k, v = map(mx.array, arrays)
    mask = cache.make_mask(k.shape[2])
    fetch = owner_of(*cache.update_and_fetch(k, v))
    assert fetch is not None
    return fetch.attend(q, scale=DIM**-0.5, mask=mask)


def take(caches: Caches, steps: list[Step], reading: bool) -> list[tuple[NDArray[Any], ...]]:
    """Tokens for each row, in chunks as mlx-lm reads them; what attention gave each row."""
    lengths = [step.size for step in steps]
    width = max(lengths)
    if reading and min(lengths) < width:
        for cache in caches:
            cache.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
    chunk, parts = CHUNK if reading else width, []
    data = [[step.rows(layer) for step in steps] for layer in range(LAYERS)]
    for start in range(0, width, chunk):
        for layer, cache in enumerate(caches):
            arrays = []
            for side in range(3):
                padded = np.full((len(steps), data[layer][0][side].shape[0], width, DIM), np.nan)
                for row, n in enumerate(lengths):
                    padded[row, :, :n] = data[layer][row][side]
                arrays.append(padded[:, :, start : start + chunk].astype(np.float32))
            parts.append((layer, start, attended(cache, arrays)))
        mx.eval([cache.state for cache in caches])
    if reading and min(lengths) < width:
        for cache in caches:
            cache.finalize()
    out = []
    for row, n in enumerate(lengths):
        mine: list[list[NDArray[Any]]] = [[] for _ in range(LAYERS)]
        for layer, start, found in parts:
            if start < n:
                mine[layer].append(np.array(found[row, :, : n - start]))
        out.append(tuple(np.concatenate(each, axis=1) for each in mine))
    return out


def replayed(kv: str, history: list[Step]) -> Caches:
    """Caches that live alone after the same; asserts that attention gave the same."""
    caches = fresh(kv)
    for step in history:
        if step.kind == "trim":
            assert Sequences.of(caches).rewind(step.size) == step.size
        elif step.kind == "reply":
            for sequence in Sequences.of(caches):
                sequence.last_of_prompt()
        elif step.kind == "read":
            with Sequences.of(caches).reading():
                (out,) = take(caches, [step], True)
        else:
            (out,) = take(caches, [step], False)
        if step.kind in ("read", "take"):
            for ours, theirs in zip(step.out, out, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    return caches


def content(cache: CompressedKVCache) -> list[Any]:
    """All that a layer holds: numbers and arrays, its blocks in order."""
    if cache.layer is None:
        return []
    layer, found = cache.layer, [cache.offset, cache.layer.placed]
    found += [np.array(x) for x in layer.exact]
    if layer.body is not None:
        found += [np.array(x) for x in layer.body.centers]
        found += list(vars(layer.body.describe()).values())
        for table in layer.body.tables:
            found += [table.lengths, np.array(table.pool.array)[table.pool.places(table.owned)]]
    return found


@dataclass
class Walk:
    """A random walk of one seed."""

    kv: str
    seed: int
    kept: list[Kept] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.pools: weakref.WeakSet[BlockPool] = weakref.WeakSet()
        self.steps = 0

    def run(self, steps: int) -> None:
        verbs: list[tuple[float, Callable[[], None]]] = [
            (2, self.begin), (3, self.read), (2, self.reply), (6, self.decode), (1, self.trim),
            (2, self.merge), (2, self.extend), (3, self.filter), (2, self.extract),
            (2, self.duplicate), (1, self.compact), (3, self.drop),
        ]  # fmt: skip
        odds = np.array([weight for weight, _ in verbs]) / sum(weight for weight, _ in verbs)
        for self.steps in range(steps):
            if not self.kept:
                self.begin()
            verb = verbs[int(self.rng.choice(len(verbs), p=odds))][1]
            verb()
            self.counts[verb.__name__] = self.counts.get(verb.__name__, 0) + 1
            self.check()
            if self.kept and self.steps % 37 == 0:
                self.verify(self.pick())
        while self.kept:
            self.verify(self.kept[-1])
            self.kept.pop()
            self.check()
        assert not len(self.pools)

    # What is checked.

    def check(self) -> None:
        tables = [
            table
            for kept in self.kept
            for caches in kept.lists()
            for cache in caches
            if cache.layer
            for table in cache.layer.tables
        ]
        self.pools.update(table.pool for table in tables)
        check_owners(tables, self.pools)
        for kept in self.kept:
            for caches in kept.lists():
                (sequence,) = Sequences.of(caches).sequences
                assert sequence.layers == [cache.layer for cache in caches if cache.layer]

    def verify(self, kept: Kept) -> None:
        for caches, history in zip(kept.lists(), kept.histories, strict=True):
            alone = replayed(self.kv, history)
            for ours, theirs in zip(caches, alone, strict=True):
                for a, b in zip(content(ours), content(theirs), strict=True):
                    np.testing.assert_array_equal(a, b)

    # What happens.

    def pick(self, fits: Callable[[Kept], bool] = lambda kept: True) -> Kept:
        found = [kept for kept in self.kept if fits(kept)] or self.kept
        return found[int(self.rng.integers(len(found)))]

    def begin(self) -> None:
        if len(self.kept) < 8:
            self.kept.append(Kept(fresh(self.kv), [[]]))

    def read(self) -> None:
        kept = self.pick(lambda kept: all(not history for history in kept.histories))
        if not kept.is_full:
            with Sequences.of(kept.caches).reading():
                self.take("read", kept, lambda: int(self.rng.integers(1, 121)))

    def reply(self) -> None:
        kept = self.pick()
        for sequence in Sequences.of(kept.caches):
            sequence.last_of_prompt()
        for history in kept.histories:
            history.append(Step("reply"))
        self.take("take", kept, lambda: 1)

    def decode(self) -> None:
        tokens = 1 if self.rng.random() < 0.7 else int(self.rng.integers(2, 9))
        kept = self.pick(lambda kept: kept.is_batch)
        for _ in range(int(self.rng.integers(1, 5))):
            self.take("take", kept, lambda: tokens)

    def take(self, kind: str, kept: Kept, size: Callable[[], int]) -> None:
        if kept.is_full:
            return
        seeds = self.rng.integers(1 << 31, size=len(kept.histories)).tolist()
        steps = [Step(kind, size(), seed) for seed in seeds]
        out = take(kept.caches, steps, kind == "read")
        for history, step, found in zip(kept.histories, steps, out, strict=True):
            history.append(Step(kind, step.size, step.seed, found))

    def trim(self) -> None:
        kept = self.pick(lambda kept: not kept.is_batch and kept.caches[0].offset > 0)
        least = min(cache.offset for cache in kept.lists()[0])
        if kept.is_batch or not least:
            return
        layers = [cache.layer for cache in kept.caches]
        ragged = any(layer.placed for layer in layers)
        most = min(layer.recent for layer in layers) if ragged else least
        n = int(self.rng.integers(0, most + 1))
        assert Sequences.of(kept.caches).rewind(n) == n
        kept.histories[0].append(Step("trim", n))

    def merge(self) -> None:
        singles = [kept for kept in self.kept if not kept.is_batch]
        rows = [kept for kept in singles if self.rng.random() < 0.6][:3] or singles[:1]
        rows += rows[:1] * int(self.rng.integers(0, 3))
        if not rows or len(self.kept) > 10:
            return
        merged = [
            layers[0].merge(list(layers))
            for layers in zip(*(kept.caches for kept in rows), strict=True)
        ]
        self.kept.append(Kept(merged, [list(kept.histories[0]) for kept in rows]))
        if self.rng.random() < 0.7:
            self.kept = [kept for kept in self.kept if kept not in rows]

    def extend(self) -> None:
        batches = [kept for kept in self.kept if kept.is_batch]
        if len(batches) < 2 or sum(len(kept.histories) for kept in batches[:2]) > 6:
            return
        first, second = batches[:2]
        for cache, other in zip(first.caches, second.caches, strict=True):
            cache.extend(other)
        first.histories += [list(history) for history in second.histories]
        if self.rng.random() < 0.7:
            self.kept = [kept for kept in self.kept if kept is not second]

    def filter(self) -> None:
        kept = self.pick(lambda kept: kept.is_batch)
        if not kept.is_batch:
            return
        rows = len(kept.histories)
        order = self.rng.permutation(rows)[: int(self.rng.integers(1, rows + 1))].tolist()
        if self.rng.random() < 0.1:
            order += order[:1] * int(self.rng.integers(1, 3))
        for cache in kept.caches:
            cache.filter(order)
        kept.histories = [list(kept.histories[i]) for i in order]

    def extract(self) -> None:
        kept = self.pick(lambda kept: kept.is_batch)
        if not kept.is_batch or len(self.kept) > 10:
            return
        row = int(self.rng.integers(len(kept.histories)))
        caches = [cache.extract(row) for cache in kept.caches]
        self.kept.append(Kept(caches, [list(kept.histories[row])]))

    def duplicate(self) -> None:
        kept = self.pick()
        if len(self.kept) <= 10:
            histories = [list(history) for history in kept.histories]
            self.kept.append(Kept(copy.deepcopy(kept.caches), histories))

    def compact(self) -> None:
        kept = self.pick()
        if self.rng.random() < 0.5:
            Sequences.of(kept.caches).compact()
            return
        for cache in kept.lists()[0]:
            if cache.layer and cache.layer.body:
                cache.layer.body.compact()

    def drop(self) -> None:
        kept = self.pick(lambda kept: kept.is_batch or len(self.kept) > 5)
        self.kept = [other for other in self.kept if other is not kept]


KINDS = [
    "leankv:window=32", LEAN, "leankv:window=32,mask=some", f"{LEAN},mask=some",
    f"{LEAN},basis=some",
]  # fmt: skip


@pytest.mark.parametrize("kv", KINDS)
def test_a_random_walk(kv: str) -> None:
    walk = Walk(kv, seed=1)
    walk.run(500)
    assert len(walk.counts) == 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kv", KINDS)
def test_a_long_random_walk(kv: str, seed: int) -> None:
    Walk(kv, seed=100 + seed).run(5000)
