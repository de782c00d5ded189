"""Whether one prompt waits for another one, and where that one is cut."""

from __future__ import annotations

import random

import pytest

from leankv_mlx.serving.sharing import WORTH, Reading, common

DOCUMENT = list(range(4000))


@pytest.mark.parametrize("n", [0, 1, 63, 4095, 4096, 4097, 9000])
def test_common(n: int) -> None:
    beginning = list(range(n))
    assert common([*beginning, -1, 5], [*beginning, -2, 5]) == n
    assert common(beginning, [*beginning, 7]) == n
    assert common([], beginning) == 0


def test_a_prompt_waits_for_the_document_that_both_begin_with() -> None:
    reading = Reading([*DOCUMENT, -1, -2, -3], read=0)
    other = [*DOCUMENT, -4, -5]
    assert reading.cut_for(other, have=0) == 4000
    reading.add(4000)
    reading.read = 3999
    assert reading.cut_for(other, have=0) == 4000
    reading.read = 4000
    assert reading.cut_for(other, have=0) is None


@pytest.mark.parametrize(
    ("prompt", "have", "why"),
    [
        ([*DOCUMENT[: WORTH - 1], -1], 0, "little in common"),
        ([*DOCUMENT[:100], *[-1] * 101], 0, "most of it is its own"),
        ([*DOCUMENT, -1], 4000, "all of it is stored"),
        ([*DOCUMENT, -1], 3990, "nearly all of it is stored"),
        ([], 0, "empty"),
    ],
)
def test_a_prompt_does_not_wait(prompt: list[int], have: int, why: str) -> None:
    assert Reading([*DOCUMENT, -2], read=0).cut_for(prompt, have) is None, why


def test_nobody_waits_for_what_was_read_already() -> None:
    reading = Reading([*DOCUMENT, *[-1] * 500], read=4100)
    assert reading.cut_for([*DOCUMENT, -2], have=0) is None


def test_the_same_prompt_leaves_its_last_token_to_be_read() -> None:
    assert Reading(DOCUMENT, read=0).cut_for(DOCUMENT, have=0) == 3999


def test_those_that_part_close_to_each_other_share_a_cut() -> None:
    rng = random.Random(0)
    reading = Reading([*DOCUMENT, *[-1] * 9], read=0)
    for end in rng.sample(range(3950, 4000), 20):
        cut = reading.cut_for([*DOCUMENT[:end], -7, -8], have=0)
        assert cut is not None and end - WORTH < cut <= end
        reading.add(cut)
    assert len(reading.cuts) == 1
    far = reading.cut_for([*DOCUMENT[:2000], -7], have=0)
    assert far == 2000
    reading.add(far)
    assert len(reading.cuts) == 2
