"""Exact rows of copies: each has its own, and what they have in common is held once."""

from __future__ import annotations

import random
import threading
from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.exact import ExactRows
from leankv_mlx.kernels import Rows

SINKS = 4


def rows(*numbers: int) -> Rows:
    """A row for each number, which all of its channels are."""
    side = mx.array(numbers, mx.float32).reshape(1, -1, 1)
    return Rows(
        mx.broadcast_to(side, (2, len(numbers), 4)), mx.broadcast_to(-side, (2, len(numbers), 3))
    )


def numbers(exact: ExactRows) -> list[int]:
    k, v = exact.rows()
    assert np.array_equal(np.array(k)[..., :3], -np.array(v))
    return [int(x) for x in np.array(k)[1, :, 0]]


def extended(exact: ExactRows, *more: int) -> None:
    exact.extend(
        Rows(*(mx.concatenate(x, axis=1) for x in zip(exact.tail, rows(*more), strict=True)))
    )


@pytest.mark.parametrize("seed", range(8))
def test_copies_hold_what_each_of_them_should(seed: int) -> None:
    draw, count = random.Random(seed), 0
    copies = [(ExactRows(rows(*range(90)), SINKS), list(range(90)))]
    for step in range(200):
        at = draw.randrange(len(copies))
        exact, wanted = copies[at]
        window = len(wanted) - SINKS
        match draw.choice(["append", "append", "leave", "cut", "copy", "end"]):
            case "append":
                more = range(1000 + count, 1000 + count + draw.randint(1, 20))
                count += 20
                extended(exact, *more)
                wanted += more
            case "leave" if window > 0:
                n = draw.randint(1, window)
                exact.leave(n)
                del wanted[SINKS : SINKS + n]
            case "cut" if window > 0:
                n = draw.randint(1, window)
                exact.cut(n)
                del wanted[-n:]
            case "copy" if len(copies) < 6:
                copies.append((exact.copy(), list(wanted)))
            case "end" if len(copies) > 1:
                del copies[at], exact
        for exact, wanted in copies:
            assert exact.count == len(wanted) and numbers(exact) == wanted, step


def held(copies: list[ExactRows]) -> int:
    arrays = {id(array): array.nbytes for each in copies for array in each.arrays}
    return sum(arrays.values())


def test_what_copies_have_in_common_is_held_once() -> None:
    document = ExactRows(rows(*range(90)), SINKS)
    once = held([document])
    copies = [document.copy() for _ in range(16)]
    assert held([document, *copies]) == once
    for i, each in enumerate(copies):
        extended(each, 100 + i, 200 + i)
        each.leave(32)
    assert held([document, *copies]) == once + 16 * 2 * once // 90
    assert numbers(copies[3]) == [0, 1, 2, 3, *range(36, 90), 103, 203]


def test_the_last_one_holds_no_more_than_its_rows() -> None:
    document = ExactRows(rows(*range(90)), SINKS)
    copy = document.copy()
    copy.leave(32)
    del document
    extended(copy, 90)
    mx.eval(copy.arrays)
    assert held([copy]) == sum(x.nbytes for x in rows(*range(59)))


def test_a_few_rows_are_not_worth_it() -> None:
    short = ExactRows(rows(*range(20)), SINKS)
    copy = short.copy()
    extended(copy, 20)
    assert numbers(copy) == list(range(21)) and numbers(short) == list(range(20))
    assert len(short.arrays) == len(copy.arrays) == 2


def test_replies_to_one_document_hold_its_window_once() -> None:
    document = CompressedKVCache("leankv")
    drawn = mx.random.normal((1, 2, 1000, 64))
    document.update_and_fetch(drawn, drawn)
    replies = [document.fork() for _ in range(4)]
    for reply in replies:
        for _ in range(3):
            reply.update_and_fetch(drawn[:, :, :1], drawn[:, :, :1])
    layers = [cache.layer for cache in (document, *replies)]
    arrays = {id(x): x.nbytes for layer in layers if layer for x in layer.exact_arrays}
    of_row = layers[0].row_nbytes if layers[0] else 0
    assert sum(arrays.values()) == of_row * (document.layer.exact.k.shape[1] + 4 * 3)  # type: ignore[union-attr]


def test_common_rows_that_leave_are_stored_once() -> None:
    document = CompressedKVCache("leankv")
    drawn = mx.random.normal((1, 2, 1000, 64))
    document.update_and_fetch(drawn, drawn)
    replies = [document.fork() for _ in range(4)]
    alone = [deepcopy(reply) for reply in replies[:1]]
    for reply in (*replies, *alone):
        for _ in range(40):  # a block leaves the window of each
            reply.update_and_fetch(drawn[:, :, :1], drawn[:, :, :1])
    tables = [reply.layer.body.tables[0] for reply in replies if reply.layer and reply.layer.body]
    before = document.layer.body.tables[0]  # type: ignore[union-attr]
    assert {table.ids.shape[1] for table in tables} == {before.ids.shape[1] + 1}
    assert before.pool.used == before.blocks + 2 * 1  # a block for each head, not for each reply
    for one, other in zip(replies[0].keys_and_values(), replies[3].keys_and_values(), strict=True):
        assert mx.array_equal(one, other)
    later, first = document.fork(), replies[0].fork()
    del replies[:], alone[:]
    later.update_and_fetch(drawn[:, :, :40], drawn[:, :, :40])
    assert before.pool.used == before.blocks + 2 * 1  # a copy of a reply holds it, too
    del replies, alone, later, first, tables, reply
    assert before.pool.used == before.blocks


def test_copies_of_what_was_evaluated_can_be_read_in_any_thread() -> None:
    document = CompressedKVCache("leankv")
    drawn = mx.random.normal((1, 2, 1000, 64))
    document.update_and_fetch(drawn, drawn)
    mx.eval(document.state)
    copies = [document.fork() for _ in range(2)]
    wanted = np.array(document.layer.exact.k)  # type: ignore[union-attr]
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(np.array(copies[0].layer.exact.k)))  # type: ignore[union-attr]
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(x, wanted) for x in found)


def test_what_a_copy_has_cut_off_is_not_taken_for_what_others_stored() -> None:
    document = CompressedKVCache("leankv")
    drawn = mx.random.normal((1, 2, 1000, 64))
    document.update_and_fetch(drawn, drawn)
    first, second = document.fork(), document.fork()
    first.update_and_fetch(drawn[:, :, :40], drawn[:, :, :40])  # common rows are stored
    second.trim(document.layer.recent - 7)  # type: ignore[union-attr]
    alone = CompressedKVCache.from_state(second.state)
    for each in (second, alone):
        each.update_and_fetch(drawn[:, :, 300:400], drawn[:, :, 300:400])
    for ours, theirs in zip(second.keys_and_values(), alone.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs)
