"""Pools and tables: ownership, growth, copy on write, content."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from leankv_mlx.blocks import BlockPool, BlockTable
from leankv_mlx.blocks.pool import GROWTH_STEP
from tests.blocks.owners import check_owners

WORDS = 8


def filled(ids: np.ndarray, value: int) -> mx.array:
    return mx.full((ids.size, WORDS), value, mx.uint32)


def content(table: BlockTable) -> list[list[int]]:
    """First word of every block, by head."""
    words = np.array(table.pool.array)[:, 0]
    places, lengths = map(np.array, table.arrays())
    return [words[row[: -(-n // 32)]].tolist() for row, n in zip(places, lengths, strict=True)]


def test_a_pool_grows_in_steps_and_stays_within_its_slack() -> None:
    pool, sizes = BlockPool(WORDS), set()
    for _ in range(1000):
        pool.allocate(1)
        sizes.add(pool.capacity)
        assert pool.capacity <= 1.15 * pool.used + GROWTH_STEP
        assert pool.array.shape == (pool.capacity, WORDS)
    assert len(sizes) < 25


def test_a_table_gives_its_blocks_back_when_it_dies() -> None:
    pool = BlockPool(WORDS)
    table = BlockTable(pool, heads=2)
    table.append(3)
    twin = table.copy()
    assert pool.used == 6
    del table
    assert pool.used == 6
    del twin
    assert pool.used == 0


def test_a_long_tail_that_is_free_is_cut_off() -> None:
    table = BlockTable(BlockPool(WORDS), heads=2)
    ids = table.append(200)
    table.pool.write(ids.ravel(), filled(ids, 7))
    table.truncate(np.array([32, 64]))
    assert table.pool.capacity <= 1.15 * 200 + 2 * GROWTH_STEP + 32
    assert content(table) == [[7], [7, 7]]


@pytest.mark.parametrize("changed", [[0], [2, 0]], ids=["in a row", "scattered"])
def test_whoever_holds_an_old_array_keeps_its_content(changed: list[int]) -> None:
    pool = BlockPool(WORDS)
    ids = pool.allocate(3)
    pool.write(ids, filled(ids, 1))
    old = pool.array
    pool.write(ids[changed], filled(ids[changed], 2))
    assert np.array(old)[pool.places(ids), 0].tolist() == [1, 1, 1]
    now = np.array(pool.array)[pool.places(ids), 0].tolist()
    assert now == [2 if i in changed else 1 for i in range(3)]


def test_writes_to_scattered_blocks() -> None:
    pool = BlockPool(WORDS)
    pool.allocate(9)
    at = np.array([7, 2, 4], np.int32)
    pool.write(at, mx.broadcast_to(mx.arange(1, 4, dtype=mx.uint32)[:, None], (3, WORDS)))
    assert np.array(pool.array)[:9, 3].tolist() == [0, 0, 2, 0, 3, 0, 0, 1, 0]


def test_appending_behind_a_partly_filled_block_is_an_error() -> None:
    table = BlockTable(BlockPool(WORDS), heads=2)
    table.append(1)
    table.truncate(np.array([32, 31]))
    with pytest.raises(ValueError, match="full block"):
        table.append(1)


def tails(table: BlockTable, stamps: list[list[int]]) -> mx.array:
    """New blocks [H, B, WORDS] filled with the stamps of each head."""
    width = max(map(len, stamps))
    padded = [row + [0] * (width - len(row)) for row in stamps]
    values = mx.array(padded, mx.uint32)[..., None]
    return mx.broadcast_to(values, (table.heads, width, WORDS))


def test_new_tails_leave_shared_blocks_alone() -> None:
    table = BlockTable(BlockPool(WORDS), heads=2)
    ids = table.append(3)
    table.pool.write(ids.ravel(), filled(ids, 5))
    twin = table.copy()
    twin.replace_tails(np.array([2, 1]), np.array([20, 40]), tails(twin, [[7], [8, 9]]))
    assert content(twin) == [[5, 5, 7], [5, 8, 9]] and twin.lengths.tolist() == [84, 72]
    assert content(table) == [[5, 5, 5], [5, 5, 5]]
    assert twin.pool is table.pool and twin.pool.used == 9


def test_a_table_that_keeps_no_block_moves_to_a_pool_of_its_size() -> None:
    table = BlockTable(BlockPool(WORDS), heads=2)
    table.append(500)
    old = table.pool
    table.replace_tails(np.array([0, 0]), np.array([33, 1]), tails(table, [[1, 2], [3]]))
    assert content(table) == [[1, 2], [3]]
    assert table.pool.capacity == table.pool.used == 3 and old.used == 0


def test_a_pool_that_is_mostly_free_is_left() -> None:
    table = BlockTable(BlockPool(WORDS), heads=2)
    ids = table.append(500)
    table.pool.write(ids.ravel(), filled(ids, 4))
    table.replace_tails(np.array([2, 1]), np.array([0, 32]), tails(table, [[], [6]]))
    assert content(table) == [[4, 4], [4, 6]]
    assert table.pool.capacity == table.pool.used == 4


def test_what_ended_copies_left_is_given_up_when_blocks_are_next_taken() -> None:
    table = BlockTable(BlockPool(WORDS), heads=2)
    pool = table.pool
    for i, each in enumerate([table, *(copies := [table.copy() for _ in range(5)])]):
        ids = each.append(100)
        pool.write(ids.ravel(), filled(ids, i))
    kept = copies.pop(2)
    named, view = kept.ids.copy(), kept.arrays()
    old = pool.array
    del each, copies
    assert pool.used == 400 and pool.capacity >= 1200
    ids = table.append(1)
    pool.write(ids.ravel(), filled(ids, 9))
    assert pool.capacity <= 402 * 9 // 8
    assert content(table) == [[0] * 100 + [9]] * 2 and content(kept) == [[3] * 100] * 2
    assert (kept.ids == named).all(), "blocks keep their ids"
    assert (np.array(old)[np.array(view[0]), 0] == 3).all(), "whoever reads is not disturbed"
    check_owners([table, kept])


class Tables(RuleBasedStateMachine):
    """Random appends, truncations and copies of tables that share a pool, against plain lists."""

    HEADS = 3

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(WORDS)
        self.tables = [BlockTable(self.pool, self.HEADS)]
        self.model: list[list[list[int]]] = [[[] for _ in range(self.HEADS)]]
        self.stamp = 0

    @rule(which=st.integers(0, 3), blocks=st.integers(1, 40))
    def append(self, which: int, blocks: int) -> None:
        i = which % len(self.tables)
        lengths = self.tables[i].lengths // 32 * 32
        self.tables[i].truncate(lengths)
        self.model[i] = [h[: n // 32] for h, n in zip(self.model[i], lengths, strict=True)]
        ids = self.tables[i].append(blocks)
        self.stamp += 1
        self.pool.write(ids.ravel(), filled(ids, self.stamp))
        self.model[i] = [head + [self.stamp] * blocks for head in self.model[i]]

    @rule(which=st.integers(0, 3), parts=st.tuples(*[st.floats(0, 1)] * HEADS))
    def truncate(self, which: int, parts: tuple[float, ...]) -> None:
        i = which % len(self.tables)
        lengths = (self.tables[i].lengths * np.array(parts)).astype(np.int32)
        self.tables[i].truncate(lengths)
        self.model[i] = [h[: -(-n // 32)] for h, n in zip(self.model[i], lengths, strict=True)]

    @precondition(lambda self: len(self.tables) < 4)
    @rule(which=st.integers(0, 3))
    def duplicate(self, which: int) -> None:
        i = which % len(self.tables)
        used = self.pool.used
        self.tables.append(self.tables[i].copy())
        assert self.pool.used == used
        self.model.append(copy.deepcopy(self.model[i]))

    @rule()
    def compact(self) -> None:
        self.pool.compact()
        assert self.pool.capacity == self.pool.used == len(self.pool.array)

    @precondition(lambda self: len(self.tables) > 1)
    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        i = which % len(self.tables)
        del self.tables[i], self.model[i]

    @invariant()
    def content_is_that_of_the_model(self) -> None:
        assert [content(table) for table in self.tables] == self.model

    @invariant()
    def every_block_has_as_many_owners_as_tables_name_it(self) -> None:
        check_owners(self.tables, [self.pool])


Tables.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
TestTables = Tables.TestCase
