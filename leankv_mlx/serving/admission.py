"""Which requests of a server run and which wait: order and bytes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from leankv_mlx.errors import MemoryLimitError

MOST_PASSED = 8
"""How many later requests may pass one that does not fit yet."""

Item = TypeVar("Item")


class Verdict(Enum):
    """What becomes of a request that waits."""

    FITS = "fits"
    WAITS = "waits"  # for bytes
    HOLDS = "holds"  # for something that another request is about to make


class Room(Generic[Item]):
    """What waits, in the order of its arrival.

    A later one that fits passes an earlier one that does not, so that bytes do not lie idle; but
    only so often, because a large one would never find room beside small ones that keep coming.
    """

    def __init__(self, most_passed: int = MOST_PASSED) -> None:
        self._most_passed = most_passed
        self._waiting: list[_Place[Item]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Item]:
        return iter([place.item for place in self._waiting])

    def add(self, item: Item) -> None:
        """Let it wait behind all others."""
        self._waiting.append(_Place(item))

    def remove(self, item: Item) -> None:
        """Let it wait no more; does nothing if it does not wait."""
        self._waiting = [place for place in self._waiting if place.item is not item]

    def next(self, judge: Callable[[Item], Verdict]) -> Item | None:
        """The one that is to run next, which goes on waiting until it is `passed` or removed."""
        for place in self._waiting:
            verdict = judge(place.item)
            if verdict is Verdict.FITS:
                return place.item
            if verdict is Verdict.WAITS and place.passed >= self._most_passed:
                return None
            place.waits = verdict is Verdict.WAITS
        return None

    def start(self, item: Item) -> None:
        """It runs: it has passed those before it that wait for bytes."""
        for place in self._waiting:
            if place.item is item:
                break
            place.passed += place.waits
        self.remove(item)


@dataclass(eq=False, slots=True)
class _Place(Generic[Item]):
    item: Item
    passed: int = 0
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Balance:
    """Bytes of a server's caches, against what they may take.

    Attributes:
        limit: bytes that all of them may take.
        held: bytes in use by what runs and what is stored, each block once.
        running: bytes in use by what runs alone.
        growth: bytes that what runs can still take on top.
    """

    limit: int
    held: int
    running: int
    growth: int

    def fits(self, wanted: int) -> bool:
        """Whether one more request that can take `wanted` bytes keeps to the limit."""
        return self.held + self.growth + wanted <= self.limit

    def could_fit(self, wanted: int) -> bool:
        """The same once nothing is stored any more."""
        return self.running + self.growth + wanted <= self.limit


def too_large(most: int, limit: int, tokens: int) -> MemoryLimitError | None:
    """Why a request does not fit even where nothing else is; None if it does.

    Args:
        most: bytes that it can take.
        limit: bytes that all requests together may take.
        tokens: of its prompt and its reply at their longest.
    """
    if most <= limit:
        return None
    return MemoryLimitError(
        f"this request can take {most / 1e6:,.1f} MB of KV cache for {tokens:,} tokens, and the "
        f"server's limit is {limit / 1e6:,.1f} MB; lower max_tokens, shorten the prompt, or raise "
        "--kv-memory."
    )
