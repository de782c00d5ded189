"""Where a prompt ends, by what is said and by the sizes of updates.

The kind of fault: one kind of update taken for another, which drops a prompt half read, or never
acts on a reply.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv_mlx.cache.phase import Phase

SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=40)


def taken(phase: Phase, *sizes: int) -> list[bool]:
    """Of each update whether the prompt ended before it, which is then said."""
    ends = []
    for size in sizes:
        ends.append(phase.take(size))
        if ends[-1]:
            phase.end_prompt()
    return ends


@pytest.mark.parametrize(
    ("sizes", "end"),
    [
        ((500, 1, 1), 2),  # its last token comes alone
        ((500, 1, 4, 4), 3),  # or with drafts
        ((500, 4, 1, 4, 1), None),  # sizes that change say nothing
        ((500, 1, 600, 1, 1), 4),  # in chunks, one of which has a single token
        ((5, 3) * 8 + (5,), 16),  # more than 64 tokens in small updates are a reply
        ((9, 9, 9), None),  # more than 8 are a prompt
    ],
)
def test_where_nobody_tells_sizes_do(sizes: tuple[int, ...], end: int | None) -> None:
    phase = Phase()
    ends = taken(phase, *sizes)
    assert ends == [i == end for i in range(len(sizes))]
    assert phase.now == ("prompt" if end is None else "reply")


@given(SIZES, st.integers(1, 20))
def test_a_prompt_that_is_told_of_ends_after_its_tokens_however_they_are_cut(
    sizes: list[int], step: int
) -> None:
    phase = Phase()
    phase.begin_prompt(sum(sizes), step)
    assert not any(taken(phase, *sizes)) and not phase.bound and phase.now == "prompt"
    assert taken(phase, step, step) == [True, False]
    assert phase.now == "reply" and phase.bound and phase.waits


@given(SIZES)
def test_one_that_does_not_end_inside_stays_a_prompt(sizes: list[int]) -> None:
    phase = Phase()
    phase.begin_prompt(math.inf, 1)
    assert not any(taken(phase, *sizes)) and phase.now == "prompt"


@given(SIZES)
def test_a_prompt_ends_once_and_a_long_update_begins_another(sizes: list[int]) -> None:
    phase = Phase()
    for size in sizes:
        before = phase.now
        (ended,) = taken(phase, size)
        assert phase.waits == (size <= 8) and phase.bound
        assert not (ended and before == "reply")
        if not phase.waits:
            assert phase.now == "prompt"


def test_more_than_a_step_is_another_prompt_of_which_nobody_told() -> None:
    phase = Phase()
    phase.begin_prompt(500, 16)
    assert taken(phase, 500, 16, 16) == [False, True, False]
    assert taken(phase, 17) == [False] and phase.now == "prompt" and phase.step == 8
    assert taken(phase, 16) == [False] and not phase.waits  # it is no step any more


def test_drafts_that_were_verified_end_the_prompt_and_tell_the_step() -> None:
    phase = Phase()
    taken(phase, 500)
    assert taken(phase, 12) == [False] and not phase.waits
    phase.verified()
    assert taken(phase, 12) == [True] and phase.step == 12 and phase.now == "reply"


def test_what_came_before_another_prompt_does_not_say_where_it_ends() -> None:
    phase = Phase()
    taken(phase, 500, 1, 1)
    phase.forget()
    assert phase.now == "prompt" and taken(phase, 1, 1) == [False, True]


def test_long_updates_in_a_row_are_counted() -> None:
    phase, longs = Phase(), []
    for size in (500, 400, 3, 20, 20):
        phase.take(size)
        longs.append(phase.longs)
    assert longs == [1, 2, 0, 1, 2]
