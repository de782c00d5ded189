"""Interleaved timing on a clock that does not run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise

import pytest

from leankv_mlx.benchmarks.timing import Arms, Budget, Staged, Timings, interleave


class Machine:
    """Work that takes as long as it says, and the order in which it was done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def arm(self, name: str, seconds: Iterator[float]) -> Callable[[], object]:
        def run() -> None:
            self.now += next(seconds)
            self.log.append(name)

        return run


def always(seconds: float) -> Iterator[float]:
    return (seconds for _ in count())


def test_two_arms_take_turns() -> None:
    machine = Machine()
    arms: Arms = {"a": machine.arm("a", always(1)), "b": machine.arm("b", always(2))}
    timings = interleave(arms, Budget(4, warm_up=0, fewest=1, most=2), machine.clock)
    assert machine.log == ["a", "b", *"abab"]  # one of each to warm up
    assert timings.ms("a") == 1000 and timings.ms("b") == 2000
    assert timings.ratio("b", "a") == 2


def test_medians_and_ratios_are_of_rounds() -> None:
    # The machine is three times slower in the last round: the medians differ by chance, the
    # ratios of the rounds do not.
    timings = Timings({"a": {0: 1.0, 1: 1.0, 2: 3.0}, "b": {0: 2.0, 1: 4.0, 2: 6.0}})
    assert timings.ms("a") == 1000 and timings.ms("b") == 4000
    assert timings.ratio("b", "a") == 2


def test_the_warm_up_is_not_measured() -> None:
    machine = Machine()
    seconds = iter([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    arms: Arms = {"a": machine.arm("a", seconds)}
    timings = interleave(arms, Budget(2, warm_up=10, fewest=1, most=9), machine.clock)
    assert machine.log == ["a"] * 4  # 9 + 1 seconds of warm-up, then what 2 seconds hold
    assert timings.ms("a") == 1000


def test_what_is_made_first_is_not_measured() -> None:
    machine = Machine()
    make, run = machine.arm("make", always(5)), machine.arm("run", always(1))
    seen: list[object] = []
    arms: Arms = {"a": Staged(lambda: (make(), "made")[1], lambda made: (seen.append(made), run()))}
    timings = interleave(arms, Budget(2, warm_up=0, fewest=1, most=2), machine.clock)
    assert machine.log == ["make", "run"] * 3 and seen == ["made"] * 3
    assert timings.ms("a") == 1000


def test_a_slow_arm_skips_rounds_and_meets_the_others() -> None:
    machine = Machine()
    arms: Arms = {
        "fast": machine.arm("fast", always(0.1)),
        "slow": machine.arm("slow", always(0.4)),
        "slowest": machine.arm("slowest", always(10.0)),
    }
    timings = interleave(arms, Budget(1.7, warm_up=0, fewest=2, most=16), machine.clock)
    assert list(timings.seconds["fast"]) == list(range(16))
    assert list(timings.seconds["slow"]) == [0, 4, 8, 12]
    assert list(timings.seconds["slowest"]) == [0, 8]
    assert timings.ratio("slowest", "fast") == pytest.approx(100)


def test_each_follows_every_other() -> None:
    machine = Machine()
    arms: Arms = {name: machine.arm(name, always(1)) for name in "abcdef"}
    interleave(arms, Budget(6, warm_up=0, fewest=1, most=6), machine.clock)
    rounds = ["".join(machine.log[i : i + 6]) for i in range(6, 42, 6)]
    assert all(sorted(order) == list("abcdef") for order in rounds)
    pairs = [a + b for order in rounds for a, b in pairwise(order)]
    assert len(pairs) == len(set(pairs)) == 30


def test_there_are_limits() -> None:
    machine = Machine()
    arms: Arms = {"a": machine.arm("a", always(0.0)), "b": machine.arm("b", always(100.0))}
    timings = interleave(arms, Budget(1, warm_up=0, fewest=3, most=6), machine.clock)
    assert len(timings.seconds["a"]) == 6 and len(timings.seconds["b"]) == 3
