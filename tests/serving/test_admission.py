"""Who runs next: order, passing, bytes."""

from __future__ import annotations

import random

from leankv_mlx.errors import MemoryLimitError
from leankv_mlx.serving.admission import MOST_PASSED, Balance, Room, Verdict, too_large


def drawn(room: Room[str], **verdicts: Verdict) -> str | None:
    """The next one, which starts; those without a verdict by their first letter fit."""
    found = room.next(lambda item: verdicts.get(item[0], Verdict.FITS))
    if found is not None:
        room.start(found)
    return found


def test_in_the_order_of_arrival() -> None:
    room: Room[str] = Room()
    for name in "abc":
        room.add(name)
    assert [drawn(room) for _ in range(4)] == ["a", "b", "c", None]


def test_a_small_one_passes_a_large_one_only_so_often() -> None:
    room: Room[str] = Room()
    room.add("large")
    for number in range(2 * MOST_PASSED):
        room.add(f"small {number}")
    passed = 0
    while drawn(room, l=Verdict.WAITS) is not None:
        passed += 1
    assert passed == MOST_PASSED and len(room) == 1 + MOST_PASSED
    assert drawn(room) == "large"
    assert drawn(room) == f"small {MOST_PASSED}"


def test_what_holds_for_another_one_is_not_passed() -> None:
    room: Room[str] = Room(most_passed=1)
    room.add("holds")
    for number in range(5):
        room.add(f"small {number}")
    for number in range(5):
        assert drawn(room, h=Verdict.HOLDS) == f"small {number}"
    assert drawn(room, h=Verdict.HOLDS) is None
    assert drawn(room) == "holds"


def test_what_was_removed_never_comes() -> None:
    room: Room[str] = Room()
    room.add("a")
    room.add("b")
    room.remove("a")
    room.remove("none of them")
    assert list(room) == ["b"] and drawn(room) == "b" and drawn(room) is None


def test_looking_passes_nobody() -> None:
    room: Room[str] = Room(most_passed=1)
    room.add("large")
    room.add("small")
    for _ in range(5):
        assert room.next(lambda x: Verdict.FITS if x == "small" else Verdict.WAITS) == "small"


def test_random_requests_keep_to_the_limit_and_all_of_them_run() -> None:
    rng, limit = random.Random(0), 100
    room: Room[tuple[int, int]] = Room()  # number and bytes at the end
    running: dict[tuple[int, int], int] = {}  # bytes by now

    def judge(item: tuple[int, int]) -> Verdict:
        held = sum(running.values())
        growth = sum(most - has for (_, most), has in running.items())
        fits = Balance(limit, held, held, growth).fits(item[1])
        return Verdict.FITS if fits else Verdict.WAITS

    longest, step = 0, 0
    while step < 1000 or room or running:
        if step < 1000:
            room.add((step, rng.choice([1, 2, 5, 100])))
        while (item := room.next(judge)) is not None:
            room.start(item)
            running[item] = 0
            longest = max(longest, step - item[0])
        for item, has in list(running.items()):
            running[item] = min(item[1], has + rng.choice([1, 60]))
        assert sum(running.values()) <= limit
        for item in [item for item, has in running.items() if has == item[1]]:
            del running[item]
        step += 1
    assert step < 5000 and longest < 4000


def test_what_is_stored_can_make_room() -> None:
    balance = Balance(limit=100, held=90, running=40, growth=20)
    assert not balance.fits(10)
    assert balance.could_fit(40) and not balance.could_fit(41)


def test_what_never_fits_is_refused_with_the_way_out() -> None:
    assert too_large(100, 100, 5) is None
    refused = too_large(3_000_000, 2_000_000, 12345)
    assert isinstance(refused, MemoryLimitError)
    for part in ("3.0 MB", "12,345 tokens", "2.0 MB", "--kv-memory", "max_tokens"):
        assert part in str(refused)
