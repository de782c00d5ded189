"""Bytes of many sequences: what the buffers hold, and what is shared once."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache, Sequence, entries
from leankv_mlx.codec.format import TILE
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm.usage import measure
from leankv_mlx.serving import Held, held
from leankv_mlx.serving.held import Ledger
from tests.cache.prompt_files import filled, masked, one_of_each, ragged

CONFIG = CompressionConfig.parse("leankv:window=32")


def sequence(tokens: int, seed: int = 0, layers: int = 2) -> list[CompressedKVCache]:
    """The caches of a model of two layers."""
    of = Sequence(CONFIG.policy, CONFIG.scorer)
    caches = [CompressedKVCache(CONFIG, sequence=of) for _ in range(layers)]
    return [filled(cache, tokens, seed + i) for i, cache in enumerate(caches)]


def counted(lists: list[list[Any]]) -> int:
    """Bytes by a walk over all buffers, each block and array once."""
    blocks: set[tuple[int, int]] = set()
    arrays: dict[int, int] = {}
    total = 0
    for cache in (cache for caches in lists for cache in entries(caches)):
        if not isinstance(cache, CompressedKVCache):
            total += cache.nbytes
        elif (layer := cache.layer) is not None:
            arrays |= {id(x): x.nbytes for x in (*layer.exact_arrays, *layer.space.arrays)}
            if layer.body is None:
                continue
            arrays |= {id(x): x.nbytes for x in layer.body.centers}
            total += layer.body.memory().side
            for table in layer.body.tables:
                total += table.nbytes if table.ids.size else 0
                for ids, length in zip(table.ids, table.lengths, strict=True):
                    size = table.pool.block_nbytes
                    for block in ids[: -(-length // TILE)].tolist():
                        if (id(table.pool), block) not in blocks:
                            blocks.add((id(table.pool), block))
                            total += size
    return total + sum(arrays.values())


def test_one_list_counts_what_its_caches_say() -> None:
    caches = sequence(300)
    usage = measure(caches)
    found = held([caches])
    assert (found.sequences, found.tokens, found.shared) == (1, 300, 0)
    assert (found.used, found.fp16) == (usage.used, usage.fp16)
    assert found.allocated == usage.allocated
    assert found.used == counted([caches])


def test_copies_count_once_until_they_go_on() -> None:
    caches = sequence(600)
    alone = held([caches]).used
    copies = [deepcopy(caches) for _ in range(16)]
    together = held([caches, *copies])
    tables = sum(t.nbytes for c in caches for t in c.layer.body.tables)  # type: ignore[union-attr]
    assert together.used == alone + 16 * tables == counted([caches, *copies])
    assert together.shared == 16 * (alone - tables)
    assert (together.sequences, together.tokens) == (17, 17 * 600)
    assert together.fp16 == 17 * held([caches]).fp16
    for i, copy in enumerate(copies):
        for cache in copy:
            filled(cache, 100, seed=50 + i)
    gone_on = held([caches, *copies])
    assert gone_on.used == counted([caches, *copies])
    assert gone_on.shared > 16 * alone / 2


def test_heads_that_are_stored_apart_count_once() -> None:
    caches = [filled(masked("leankv:window=32,mask=some"), 300, seed=i) for i in range(2)]
    codes = sum(cache.memory().codes + cache.memory().scales for cache in caches)
    assert held([caches]).used == counted([caches]) == measure(caches).used
    copies = [deepcopy(caches) for _ in range(4)]
    for copy in copies:
        for cache in copy:
            filled(cache, 100, seed=50)
    gone_on = held([caches, *copies])
    assert gone_on.used == counted([caches, *copies]) and gone_on.shared >= 4 * codes
    batch = BatchedKVCache.merge([caches[0], copies[0][0]])
    assert held([[batch]]).used == counted([[batch]])


def test_rows_of_a_batch_are_sequences_each() -> None:
    caches = sequence(300)
    other = sequence(200, seed=9)
    batch = [BatchedKVCache.merge([a, a, b]) for a, b in zip(caches, other, strict=True)]
    found = held([batch])
    assert (found.sequences, found.tokens) == (3, 800)
    assert found.used == counted([batch])
    with_sources = held([batch, caches, other])
    assert with_sources.sequences == 5
    assert with_sources.used == counted([batch, caches, other]) < 1.2 * found.used


def test_caches_of_mlx_lm_count_what_they_allocate() -> None:
    plain, arrays = filled(stock.KVCache(), 300), stock.ArraysCache(2)
    arrays[0] = mx.zeros((1, 3, 8))
    assert held([[plain, arrays]]).used == plain.nbytes + arrays.nbytes
    assert held([[plain]]).fp16 == 2 * 2 * plain.keys.size * 300 // plain.keys.shape[2]
    batch = stock.KVCache.merge([plain, filled(stock.KVCache(), 200)])
    found = held([[batch]])
    assert (found.sequences, found.tokens) == (2, 500)
    assert held([[stock.CacheList(plain, filled(stock.KVCache(), 300))]]).tokens == 300
    quantized = filled(stock.QuantizedKVCache(group_size=32, bits=4), 256)
    assert held([[quantized]]).fp16 == held([[filled(stock.KVCache(), 256)]]).fp16


def test_nothing_and_empty_caches() -> None:
    assert held([]) == Held() == held([[]])
    empty = [CompressedKVCache(CONFIG), stock.KVCache()]
    assert held([empty]) == Held(sequences=1)


def test_every_kind_of_cache_is_counted() -> None:
    caches = one_of_each()
    assert held([caches]).used == counted([caches])


def test_a_ledger_counts_what_is_there_whatever_came_and_went() -> None:
    rng = random.Random(0)
    ledger, there = Ledger(), []
    bases = [sequence(rng.randrange(60, 400), seed=10 * i) for i in range(3)]
    for step in range(120):
        if there and rng.random() < 0.45:
            _, share = there.pop(rng.randrange(len(there)))
            ledger.remove(share)
        else:
            copy = deepcopy(rng.choice(bases))
            cut = rng.randrange(200)
            for cache in copy:
                cache.trim(cut)
                if rng.random() < 0.3:
                    filled(cache, rng.randrange(9, 90), seed=step)
                if rng.random() < 0.2 and cache.layer.body:
                    ragged(cache)
            there.append((copy, ledger.add(copy)))
        lists = [caches for caches, _ in there]
        assert ledger.used == ledger.held.used == counted(lists)
        assert ledger.held == held(lists)
    for _, share in there:
        ledger.remove(share)
    assert ledger.held == Held() and not ledger._arrays
