"""Several sequences of a layer behind mlx-lm's protocol: padding, masks, batch verbs, bytes, peaks.

The kinds of fault: padding that is taken for tokens, a row that reads another's, copies that cost
memory, and a family of copies that keeps it. Random walks are in `test_batch_machine`, models in
`tests/mlx_lm/test_batch`.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import ArraysCache, BatchKVCache, CacheList, KVCache

from leankv_mlx.blocks.pool import GROWTH_STEP
from leankv_mlx.cache import BatchedKVCache, CompressedKVCache, Sequence, Sequences, owner_of
from leankv_mlx.cache.fetch import Withheld
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import DroppedTokensError, ShapeError, UnsupportedError
from leankv_mlx.kernels import resolve_backend
from leankv_mlx.kernels.prefill_attention import QUERY_TILE
from leankv_mlx.mlx_lm import attach
from tests.blocks.owners import check_owners
from tests.cache.test_peak_memory import DIM as PEAK_DIM
from tests.cache.test_peak_memory import HEADS, QUERY_HEADS, SIZE
from tests.models import TINY

H, G, DIM = 2, 2, 64
KV = "leankv:k8v8,window=32"
LEAN = "leankv:policy=budget,ratio=8,window=32"


def rows(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal((*shape, DIM), key=mx.random.key(seed))


def filled(*lengths: int, kv: str = KV) -> list[CompressedKVCache]:
    """A cache of one layer for each length."""
    caches = [CompressedKVCache(kv) for _ in lengths]
    for i, (cache, n) in enumerate(zip(caches, lengths, strict=True)):
        if n:
            cache.update_and_fetch(rows(1, H, n, seed=i), rows(1, H, n, seed=100 + i))
    return caches


def stock(caches: list[CompressedKVCache]) -> BatchKVCache:
    """mlx-lm's batch of the same tokens."""
    made = []
    for cache in caches:
        made.append(KVCache())
        if not cache.empty():
            made[-1].update_and_fetch(*cache.keys_and_values())
    return KVCache.merge(made)


def plain(queries: mx.array, cache: Any, mask: Any) -> mx.array:
    keys, values = cache.keys_and_values()
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)


def close(a: Any, b: Any, tolerance: float = 2e-2) -> bool:
    return bool(np.abs(np.array(a) - np.array(b)).max(initial=0.0) < tolerance)


# Padding and masks.


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize("lengths", [(40, 7, 90), (30, 30), (0, 12)])
def test_arrays_and_masks_are_those_of_mlx_lm(
    lengths: tuple[int, ...], window: int | None, n: int
) -> None:
    caches = filled(*lengths)
    theirs, ours = stock(caches), BatchedKVCache.merge(caches)
    assert ours.offset.tolist() == theirs.offset.tolist() and ours.size() == theirs.size()
    asked: dict[str, Any] = {} if window is None else {"window_size": window}
    mask, expected = (cache.make_mask(n, return_array=True, **asked) for cache in (ours, theirs))
    assert mx.array_equal(mx.broadcast_to(mask, expected.shape), expected)
    k, v, q = rows(len(lengths), H, n), rows(len(lengths), H, n, seed=1), rows(len(lengths), 4, n)
    fetched, kept = ours.update_and_fetch(k, v), theirs.update_and_fetch(k, v)
    assert [x.shape for x in fetched] == [x.shape for x in kept]
    wanted = plain(q, theirs, expected)
    # Through the caches; with a mask that they do not know; and of the arrays.
    owner = owner_of(*fetched)
    assert owner is not None
    assert close(owner.attend(q, scale=1.0, mask=mask), wanted, 0.05)
    assert close(owner.attend(q, scale=1.0, mask=mask & True), wanted, 0.05)
    assert close(plain(q, ours, mask), wanted, 0.05)


def test_a_mask_that_says_no_more_than_the_causal_rule_is_none() -> None:
    even, uneven = (BatchedKVCache.merge(filled(*lengths)) for lengths in ((9, 9), (9, 3)))
    assert even.make_mask(1) is None and even.make_mask(5) == "causal"
    assert even.make_mask(1, return_array=True).shape == (2, 1, 1, 10)
    assert uneven.make_mask(1).shape == (2, 1, 1, 10)
    uneven.finalize()
    even.prepare(lengths=[5, 2], right_padding=[0, 3])
    assert isinstance(even.make_mask(5), mx.array)


@pytest.mark.parametrize("chunk", [3, 8, 9, 40])
def test_padding_on_either_side_is_never_stored(chunk: int) -> None:
    lengths, width = [40, 5, 1, 23], 40
    k, v = rows(4, H, width), rows(4, H, width, seed=1)
    for left in (False, True):
        cache = BatchedKVCache(CompressedKVCache(KV) for _ in lengths)
        padding = [width - n for n in lengths]
        if left:
            cache.prepare(left_padding=padding)
            assert cache.offset.tolist() == [-n for n in padding]
        else:
            cache.prepare(lengths=lengths, right_padding=padding)
        for start in range(0, width, chunk):
            part = slice(start, start + chunk)
            mask = cache.make_mask(min(chunk, width - start))
            if left:
                assert not any(np.array(mask[i])[..., :n].any() for i, n in enumerate(padding))
            found = owner_of(*cache.update_and_fetch(k[:, :, part], v[:, :, part]))
            out = found.attend(rows(4, H * G, width)[:, :, part], scale=1.0, mask=mask)
            for row, n in enumerate(lengths):
                first = width - n if left else 0
                seen = np.arange(width)[part]
                none = (seen < first) | (seen >= first + n)
                assert not np.array(out[row])[:, none].any() and not mx.isnan(out[row]).any()
        cache.finalize()
        assert cache.offsets == lengths and cache.offset.tolist() == lengths
        for row, n in enumerate(lengths):
            mine = slice(width - n, width) if left else slice(n)
            kept = cache.extract(row).keys_and_values()
            assert close(kept[0], k[row : row + 1, :, mine], 0.1)
            assert close(kept[1], v[row : row + 1, :, mine], 0.1)


def test_padding_that_all_rows_have_is_not_stored_either() -> None:
    cache = BatchedKVCache(CompressedKVCache(KV) for _ in range(2))
    cache.prepare(left_padding=[7, 7])
    for n in (5, 4):  # of the first nothing is a token
        fetched = cache.update_and_fetch(rows(2, H, n), rows(2, H, n))
        out = owner_of(*fetched).attend(rows(2, 4, n), scale=1.0, mask=None)
        assert out.shape == (2, 4, n, DIM) and fetched[0].shape[2] == n
        assert mx.all(out[:, :, : 5 if n == 5 else 2] == 0)
    assert cache.offsets == [2, 2]
    cache.prepare(lengths=[3, 3], right_padding=[1, 1])
    cache.update_and_fetch(rows(2, H, 4), rows(2, H, 4))
    cache.finalize()
    assert cache.offsets == [5, 5]


def test_rows_that_come_and_go_take_their_padding_along() -> None:
    cache = BatchedKVCache(CompressedKVCache(KV) for _ in range(3))
    cache.prepare(lengths=[9, 2, 5], right_padding=[0, 7, 4])
    cache.filter([2, 0])
    other = BatchedKVCache([CompressedKVCache(KV)])
    cache.extend(other)
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        each.update_and_fetch(rows(3, H, 9), rows(3, H, 9))
        assert each.offsets == [5, 9, 9]


def test_a_layer_may_be_attended_to_again() -> None:
    for n in (3, 20):
        cache = BatchedKVCache.merge(filled(40, 7))
        cache.prepare(lengths=[n, 2], right_padding=[0, n - 2])
        fetched = cache.update_and_fetch(rows(2, H, n), rows(2, H, n))
        again = cache.keys_and_values()
        assert again[0] is fetched[0] and again[1] is fetched[1]
        owner = owner_of(*fetched)
        first = owner.attend(rows(2, 4, n), scale=1.0, mask="causal")
        assert mx.array_equal(first, owner.attend(rows(2, 4, n), scale=1.0, mask="causal"))
        expected = [np.array(x) for x in fetched]
        del fetched, again
        for ours, theirs in zip(cache.keys_and_values(), expected, strict=True):
            assert close(ours, theirs, 0.1)


def test_what_is_not_understood_is_refused() -> None:
    cache = BatchedKVCache.merge(filled(4, 4))
    for keys, values in (
        (rows(3, H, 1), rows(3, H, 1)), (rows(2, H, 1), rows(2, H, 2)), (rows(2, H), rows(2, H)),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=r"expected keys \[2, H, L, D\]"):
            cache.update_and_fetch(keys, values)
    with pytest.raises(UnsupportedError, match="left padding"):
        cache.prepare(left_padding=[1, 0])
    for lengths in (None, [3]):
        with pytest.raises(UnsupportedError, match="lengths of all rows"):
            cache.prepare(lengths=lengths, right_padding=[1, 0])
    with pytest.raises(UnsupportedError, match="empty cache"):
        BatchedKVCache.merge(filled(0, 0)).keys_and_values()
    assert cache.offsets == [4, 4]


def test_an_empty_batch_has_nothing_and_can_be_extended() -> None:
    cache = BatchedKVCache.merge(filled(50, 9))
    cache.filter([])
    assert (cache.size(), cache.nbytes, cache.offsets, cache.trim(3)) == (0, 0, [], 0)
    assert cache.empty() and cache.is_trimmable() and cache.offset.shape == (0,)
    assert cache.make_mask(1) is None
    mx.eval(cache.state)
    with pytest.raises(ShapeError):
        cache.update_and_fetch(rows(0, H, 1), rows(0, H, 1))
    cache.extend(BatchedKVCache.merge(filled(50)))
    assert cache.offsets == [50]


# Batch verbs.


def test_verbs_copy_no_block() -> None:
    caches = filled(600, 300)
    pools = [cache.layer.body.tables[0].pool for cache in caches]
    arrays = [pool.array for pool in pools]
    batch = BatchedKVCache.merge(caches)
    batch.extend(batch)
    batch.filter(mx.array([3, 0, 0]))
    taken = [batch.extract(i) for i in range(3)] + [copy.deepcopy(batch).rows[1]]
    assert [cache.offset for cache in taken] == [300, 600, 600, 600]
    for cache in taken:
        pool = cache.layer.body.tables[0].pool
        assert pool is pools[0 if cache.offset == 600 else 1]
    assert all(pool.array is array for pool, array in zip(pools, arrays, strict=True))
    assert len({id(row) for row in batch.rows}) == 3


def test_copies_made_layer_by_layer_are_one_sequence_again() -> None:
    config = CompressionConfig.parse(LEAN)
    sequence = Sequence(config.policy, config.scorer)
    caches = [CompressedKVCache(config, sequence=sequence) for _ in range(3)]
    for cache in caches:
        cache.update_and_fetch(rows(1, H, 20), rows(1, H, 20))
    batch = [BatchedKVCache.merge([cache] * 3) for cache in caches]
    for cache in batch:
        cache.filter([0, 1, 2, 1, 1])
    of_rows = [Sequences.of([cache.rows[i] for cache in batch]).sequences for i in range(5)]
    assert [len(found) for found in of_rows] == [1] * 5 and len(set(sum(of_rows, ()))) == 5
    for layered in (
        [cache.extract(0) for cache in batch], copy.deepcopy(caches),
        [cache.fork() for cache in caches],
    ):  # fmt: skip
        (found,) = Sequences.of(layered).sequences
        assert found.layers == [cache.layer for cache in layered]
        assert found not in (sequence, *sum(of_rows, ()))


def test_a_list_of_several_caches_in_one_entry() -> None:
    def entry(n: int) -> CacheList:
        made = CacheList(ArraysCache(1), *filled(n))
        made[0][0] = mx.full((1, 3), n)
        return made

    batch = CacheList.merge([entry(40), entry(7)])
    assert [type(cache) for cache in batch.caches] == [ArraysCache, BatchedKVCache]
    batch.prepare(lengths=[9, 2], right_padding=[0, 7])
    batch[1].update_and_fetch(rows(2, H, 9), rows(2, H, 9))
    batch.finalize()
    batch.extend(CacheList.merge([entry(3)]))
    batch.filter([2, 1])
    mx.eval(batch.state)
    assert batch[1].offsets == [3, 9] and batch[0][0][:, 0].tolist() == [3, 7]
    taken = batch.extract(1)
    assert type(taken[1]) is CompressedKVCache and taken[1].offset == 9
    assert len(Sequences.of([batch]).ours) == 2


def test_trims_take_from_every_row() -> None:
    caches = filled(100, 3, 60)
    batch = BatchedKVCache.merge(caches)
    assert batch.is_trimmable() and batch.trim(50) == 50
    assert batch.offsets == [50, 0, 10] and [cache.offset for cache in caches] == [100, 3, 60]
    mx.eval(batch.update_and_fetch(rows(3, H, 1), rows(3, H, 1)))
    assert batch.offsets == [51, 1, 11]


def test_arrays_of_a_batch_that_dropped_tokens_are_refused_where_they_are_read() -> None:
    caches = filled(900, 20, kv="leankv:policy=streaming,window=32")
    for cache in caches:
        owner_of(*cache.keys_and_values()).attend(rows(1, 4, 1), scale=1.0, mask=None)
        cache.sequence.end_prompt()
    assert caches[0].layer.ragged and not caches[1].layer.ragged
    batch = BatchedKVCache.merge(caches)
    assert not batch.is_trimmable()
    k = rows(2, H, 1)
    mask = batch.make_mask(1)
    keys, values = batch.update_and_fetch(k, k)
    assert isinstance(keys, Withheld) and keys.shape == (2, H, 901, DIM) == values.shape
    with pytest.raises(DroppedTokensError):
        keys + 1
    owner = owner_of(keys, values)
    with pytest.raises(DroppedTokensError):
        mx.eval(owner.attend(rows(2, 4, 1), scale=1.0, mask=mask & True))
    mx.eval(owner.attend(rows(2, 4, 1), scale=1.0, mask=mask))
    batch.update_and_fetch(k, k)  # which nobody attends to
    with pytest.raises(DroppedTokensError, match="reads keys and values itself"):
        batch.update_and_fetch(k, k)


# Bytes.


def used(caches: list[Any]) -> int:
    return sum(cache.nbytes for cache in caches)


def test_a_block_that_rows_share_counts_once() -> None:
    (cache,) = filled(2000)
    codes = sum(t.blocks * t.pool.block_nbytes for t in cache.layer.body.tables)
    batch = BatchedKVCache.merge([cache] * 5)
    assert batch.nbytes == 5 * cache.nbytes - 4 * codes
    batch.update_and_fetch(rows(5, H, 200), rows(5, H, 200))
    grown = [row.nbytes for row in batch.rows]
    assert batch.nbytes == sum(grown) - 4 * codes
    assert all(n > cache.nbytes for n in grown)
    pool = cache.layer.body.tables[0].pool
    reserve = (pool.capacity - pool.used) * pool.block_nbytes
    for row in (cache, *batch.rows):  # of others alone it has nothing
        assert row.memory().allocated == row.nbytes + reserve


def test_copies_of_a_document_hold_it_once() -> None:
    (document,) = filled(4096, kv="leankv:window=64")
    before = document.memory().allocated
    pool = document.layer.body.tables[0].pool
    batch = BatchedKVCache.merge([document] * 16)
    for _ in range(3):
        batch.update_and_fetch(rows(16, H, 16, seed=3), rows(16, H, 16))
    own = sum(row.memory().exact + row.memory().tables for row in batch.rows)
    assert own + pool.nbytes < 16 * 0.5 * before
    assert pool.nbytes < 1.35 * before


def test_a_family_gives_memory_back_when_most_of_it_ends() -> None:
    (document,) = filled(1000)
    pool = document.layer.body.tables[0].pool
    alone = pool.used
    batch = BatchedKVCache.merge([document] * 12)
    batch.update_and_fetch(rows(12, H, 640), rows(12, H, 640))
    most = pool.capacity
    assert most > 5 * alone and batch.rows[3].layer.body.tables[0].pool is pool
    expected = [np.array(x) for x in batch.extract(11).keys_and_values()]
    view = batch.rows[11].view()
    before = np.array(mx.take(view.tiers[0].pool, view.tiers[0].table.reshape(-1), axis=0))
    batch.filter([11])
    assert pool.used == batch.rows[0].layer.body.tables[0].blocks < most / 4
    batch.update_and_fetch(rows(1, H, 96), rows(1, H, 96))  # which takes blocks
    assert pool.capacity <= pool.used * 9 / 8 + GROWTH_STEP
    check_owners([document.layer.body.tables[0], batch.rows[0].layer.body.tables[0]])
    for ours, theirs in zip(batch.keys_and_values(), expected, strict=True):
        assert np.array_equal(np.array(ours)[:, :, :1600], theirs[:, :, :1600])
    # What was read before stays what it was.
    after = np.array(mx.take(view.tiers[0].pool, view.tiers[0].table.reshape(-1), axis=0))
    assert np.array_equal(before, after)


def test_what_is_kept_can_be_compacted() -> None:
    (document,) = filled(1000)
    pool = document.layer.body.tables[0].pool
    held = pool.nbytes
    expected = [np.array(x) for x in document.keys_and_values()]
    batch = BatchedKVCache.merge([document] * 12)
    batch.update_and_fetch(rows(12, H, 640), rows(12, H, 640))
    del batch
    assert pool.nbytes > 5 * held and document.memory().allocated > 5 * held
    Sequences.of([document]).compact()
    assert pool.nbytes <= held and pool.used == pool.capacity
    for ours, theirs in zip(document.keys_and_values(), expected, strict=True):
        assert np.array_equal(np.array(ours), theirs)


def test_blocks_come_back_from_any_thread() -> None:
    (document,) = filled(500)
    pool = document.layer.body.tables[0].pool
    alone = pool.used
    batches = [BatchedKVCache.merge([document] * 4) for _ in range(4)]
    for batch in batches:
        batch.update_and_fetch(rows(4, H, 96), rows(4, H, 96))
    del batch
    assert pool.used == alone + 16 * 3 * H
    threads = [threading.Thread(target=batches.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.used == alone
    document.update_and_fetch(rows(1, H, 96), rows(1, H, 96))
    check_owners([document.layer.body.tables[0]])


def test_a_limit_in_bytes_is_a_sequences_own() -> None:
    kv = "leankv:policy=budget,budget=480K,window=32"
    config = CompressionConfig.parse(kv)

    def stack() -> list[CompressedKVCache]:
        sequence = Sequence(config.policy, config.scorer)
        return [CompressedKVCache(config, sequence=sequence) for _ in range(2)]

    def feed(caches: list[Any], count: int, n: int, seed: int) -> None:
        for layer, cache in enumerate(caches):
            k, q = rows(1, H, n, seed=seed + layer), rows(1, 4, n, seed=seed + layer + 50)
            if n > 1:  # so that the first blocks stay, and with them the pool of the family
                k[:, :, 4:150] *= 4
            k, q = (mx.repeat(x, count, axis=0) for x in (k, q))
            mask = cache.make_mask(n)
            mx.eval(owner_of(*cache.update_and_fetch(k, k)).attend(q, scale=0.1, mask=mask))

    alone, document = stack(), stack()
    for caches in (alone, document):
        with Sequences.of(caches).reading():
            feed(caches, 1, 1500, 0)
    batch = [BatchedKVCache.merge([cache] * 6) for cache in document]
    for caches in (alone, batch):
        for sequence in Sequences.of(caches):
            sequence.last_of_prompt()
    for step in range(70):
        feed(alone, 1, 1, 1000 + step)
        feed(batch, 6, 1, 1000 + step)
    expected = [cache.layer.body.describe() for cache in alone]
    for cache in batch:  # still a family
        assert len({row.layer.body.tables[0].pool for row in cache.rows}) == 1
    most = 480 << 10
    assert 0.7 * most < sum(cache.memory().allocated for cache in alone) <= most
    for row in range(6):
        found = [cache.rows[row].layer.body.describe() for cache in batch]
        for a, b in zip(expected, found, strict=True):
            assert np.array_equal(a.positions, b.positions)
            assert np.array_equal(a.tiers, b.tiers)
        assert sum(cache.rows[row].memory().allocated for cache in batch) <= most
    assert all(not cache.layer.placed for cache in document)


def batch_prefill_peak(model: nn.Module, row_tokens: int, batch: int, chunk: int) -> int:
    """Peak bytes of one chunk of a batched prefill, above what is there before it."""
    caches = [model.make_cache() for _ in range(batch)]
    for i, cache in enumerate(caches):
        k, v = mx.random.normal((2, 1, HEADS, row_tokens, PEAK_DIM), key=mx.random.key(i))
        for layer in cache:
            layer.update_and_fetch(k, v)
            mx.eval(layer.state)
    merged = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]
    del caches
    return peak_of_batch(model, merged, mx.zeros((batch, chunk), mx.int32))


def peak_of_batch(model: nn.Module, caches: list[Any], ids: mx.array) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model(ids, cache=caches)
    mx.eval([cache.state for cache in caches])
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_batched_prefill_has_one_working_copy_at_a_time(backend: str) -> None:
    layers, tokens, batch, chunk = 3, 8192, 6, 64
    model = TINY["llama"](head_dim=PEAK_DIM, layers=layers)
    stock = [KVCache.merge([KVCache()] * batch) for _ in range(layers)]
    empty = peak_of_batch(model, stock, mx.zeros((batch, chunk), mx.int32))
    with attach(model, f"leankv:backend={backend}"):
        peak = batch_prefill_peak(model, tokens, batch, chunk)
    copy_ = tokens * HEADS * 2 * PEAK_DIM * SIZE
    codes = int(0.15 * copy_)  # of one sequence in one layer, with the spare blocks of its pool
    native = resolve_backend(backend).name == "cpu"  # no score matrix
    scores = 0 if native else QUERY_TILE * tokens * QUERY_HEADS * SIZE
    bound = empty + 2 * copy_ + batch * codes + scores
    print(f"peak {peak}, empty forward {empty}, copy {copy_}, codes {codes}, scores {scores}")
    assert peak <= bound
