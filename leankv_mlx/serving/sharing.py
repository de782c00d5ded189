"""Prompts that begin alike and come at once: one is read, the others go on from what it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WORTH = 64
"""Tokens in common from which on it is worth to wait; also what a waiting prompt may lose by
going on from a cut that another one needs."""
_PIECE = 4096
"""Tokens that are compared at a time."""


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common from their beginning on."""
    end = min(len(a), len(b))
    for start in range(0, end, _PIECE):
        stop = min(end, start + _PIECE)
        if a[start:stop] != b[start:stop]:
            return start + int(np.argmin(np.equal(a[start:stop], b[start:stop])))
    return end


@dataclass
class Reading:
    """A prompt that is being read.

    Attributes:
        prompt: its tokens.
        read: how many of them are in the cache.
        cuts: where reading stops, so that what is read until then is stored.
    """

    prompt: Sequence[int]
    read: int
    cuts: set[int] = field(default_factory=set)

    def cut_for(self, prompt: Sequence[int], have: int) -> int | None:
        """How many tokens of another prompt will be stored once this one is read up to them, if it
        is worth to wait for that: both have a long beginning in common, it is most of the other
        prompt, and nobody has it yet.

        Args:
            have: tokens of the other prompt that are at hand.
        """
        shared = min(common(self.prompt, prompt), len(self.prompt) - 1, len(prompt) - 1)
        if shared < WORTH or 2 * shared < len(prompt) or have > shared - WORTH:
            return None
        near = [cut for cut in self.cuts if shared - WORTH < cut <= shared]
        cut = max(near, default=shared)
        return cut if cut > self.read else None

    def add(self, cut: int) -> None:
        """Stop there, too, and for its sake not just behind it."""
        self.cuts = {other for other in self.cuts if not cut < other < cut + WORTH} | {cut}
