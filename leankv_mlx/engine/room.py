"""How long a conversation may become: the model's context and the memory for its caches."""

from __future__ import annotations

from dataclasses import dataclass

from leankv_mlx.codec.format import TILE
from leankv_mlx.mlx_lm.footprint import Footprint
from leankv_mlx.mlx_lm.usage import Usage

_UNKNOWN_CONTEXT = 1 << 20
"""Tokens to plan with if a model does not say how many it was made for."""


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds a conversation.

    Attributes:
        budget: bytes that the caches may take.
        footprint: what caches take by their length.
        context: tokens the model was made for, 0 if unknown.
    """

    budget: int
    footprint: Footprint
    context: int

    def needed(self, held: Usage, tokens: int) -> int:
        """Bytes of the caches once they have `tokens` tokens.

        Args:
            held: what the caches hold of them now; a policy may have dropped some.
        """
        more = self.footprint.used(tokens) - self.footprint.used(held.tokens)
        return held.used + more + self._uneven

    def longest(self, held: Usage) -> int:
        """Tokens that fit, those that are held among them."""
        spare = self.budget - held.used - self._uneven
        fits = spare + self.footprint.used(held.tokens)
        return self.footprint.longest(fits, self.context or _UNKNOWN_CONTEXT)

    def left(self, held: Usage) -> int:
        """Further tokens that fit."""
        return max(0, self.longest(held) - held.tokens)

    @property
    def _uneven(self) -> int:
        """Generated tokens leave the window by a block at a time: until then they are rows."""
        return self.footprint.used(TILE)
