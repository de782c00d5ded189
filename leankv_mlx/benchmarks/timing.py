"""Interleaved timing: A B A B in one run, so that what else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Staged:
    """Work that needs something made first, which is not timed."""

    make: Callable[[], object]
    run: Callable[[object], object]


Arm = Callable[[], object] | Staged
Arms = Mapping[str, Arm]
"""What is compared, by name; a call does the work once and waits for it. The order is kept."""


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: per arm, within the limits of the other two.
        warm_up: seconds per arm before anything counts; every arm runs at least once.
        fewest, most: runs of an arm. One that takes longer than `seconds` gets the fewest.
    """

    seconds: float = 1.0
    warm_up: float = 0.2
    fewest: int = 3
    most: int = 100


@dataclass(frozen=True)
class Timings:
    """Seconds of every run: arm -> round -> seconds. A slow arm skips rounds."""

    seconds: Mapping[str, Mapping[int, float]]

    def divided(self, by: Mapping[str, int]) -> Timings:
        """The same with the times of some arms divided: their calls did the work so many times."""
        return Timings(
            {
                name: {i: one / by.get(name, 1) for i, one in runs.items()}
                for name, runs in self.seconds.items()
            }
        )

    def ms(self, name: str) -> float:
        """The median of an arm in milliseconds."""
        return 1e3 * statistics.median(self.seconds[name].values())

    def ratio(self, over: str, under: str) -> float:
        """How many times longer `over` takes: the median over the rounds in which both ran."""
        a, b = self.seconds[over], self.seconds[under]
        return statistics.median(a[i] / b[i] for i in a if i in b)


def interleave(arms: Arms, budget: Budget, clock: Clock = time.perf_counter) -> Timings:
    """Run the arms in turn, round after round.

    A slow arm takes part in every 2nd, 4th, ... round only; it then meets all arms that are
    faster in those rounds. Who follows whom changes from round to round, because the one before
    decides what is in the processor's caches.
    """
    strides = _strides({name: _warm_up(arm, budget, clock) for name, arm in arms.items()}, budget)
    rounds = {name: stride * runs for name, (stride, runs) in strides.items()}
    seconds: dict[str, dict[int, float]] = {name: {} for name in arms}
    for i in range(max(rounds.values())):
        for name in _order(list(arms), i):
            if i % strides[name][0] == 0 and i < rounds[name]:
                seconds[name][i] = _timed(arms[name], clock)
    return Timings(seconds)


def _order(names: list[str], turn: int) -> list[str]:
    """A Williams design: in as many turns as there are names, each follows nearly every other
    once. Two names just take turns."""
    n = len(names)
    if n <= 2:
        return names
    zigzag = [(i + 1) // 2 if i % 2 else -i // 2 for i in range(n)]  # 0, 1, -1, 2, -2, ...
    return [names[(at + turn) % n] for at in zigzag]


def _warm_up(arm: Arm, budget: Budget, clock: Clock) -> float:
    """Seconds that a run takes: the fastest, because the first ones also allocate."""
    end = clock() + budget.warm_up
    best = _timed(arm, clock)
    while clock() < end:
        best = min(best, _timed(arm, clock))
    return best


def _strides(estimates: Mapping[str, float], budget: Budget) -> dict[str, tuple[int, int]]:
    """For each arm in which rounds it runs: every n-th, and how many runs."""
    wanted = {
        name: max(budget.fewest, min(budget.most, int(budget.seconds / max(one, 1e-9))))
        for name, one in estimates.items()
    }
    rounds = max(wanted.values())
    strides = {}
    for name, runs in wanted.items():
        stride = 1
        while 2 * stride * runs <= rounds:
            stride *= 2
        strides[name] = stride, -(-rounds // stride)
    return strides


def _timed(arm: Arm, clock: Clock) -> float:
    if isinstance(arm, Staged):
        made = arm.make()
        start = clock()
        arm.run(made)
    else:
        start = clock()
        arm()
    return clock() - start
