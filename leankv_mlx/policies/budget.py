"""policy=budget: a share of the bytes, which heads compete for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from leankv_mlx.errors import ConfigError
from leankv_mlx.policies.policy import DROP, HIGH, LOW, Dropping, LayerSlots
from leankv_mlx.settings import BLOCK_SLOTS, Groups, LowBits, Size, check_low

if TYPE_CHECKING:
    from leankv_mlx.policies.policy import Tiers

LEAST_SLOTS = 256
"""Stored tokens per head that a budget relative to the tokens so far always leaves: short prompts
are small anyway."""


@dataclass(frozen=True)
class Budget(Dropping):
    """Bytes shared by heads by significance (AdaKV, https://arxiv.org/abs/2407.11550, section 3).

    All slots of a layer (or of the model) compete for its bytes. The most significant ones take
    the `high` share of them at the price of the high tier, the next ones the rest at that of the
    low tier. Heads get whole blocks, and each at least a part of an equal share (`shares.FLOOR`).

    Attributes:
        low: bits of the low tier; there is none with "auto" or "none".
        ratio: bytes of an uncompressed fp16 cache of the tokens so far, over those that may stay.
            LEAST_SLOTS per head stay in any case.
        budget: bytes of all layers together, for whatever is generated, and for a prompt that
            nobody tells the length of; 0 for no such limit.
        high: share of the bytes for the high tier, if there is a low one.
        scope: whether the heads of a "layer" or of the "model" share its bytes.

    Raises:
        ConfigError: a value is out of range.
    """

    name: ClassVar[str] = "budget"

    low: LowBits = "auto"
    ratio: float = 8.0
    budget: Size = 0
    high: float = 0.5
    scope: Literal["layer", "model"] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_low(self.low)
        if not 1 < self.ratio < math.inf:
            raise ConfigError(f"ratio={self.ratio:g} is out of range; use a number above 1.")
        if not 0 <= self.high <= 1:
            raise ConfigError(f"high={self.high:g} is out of range; use 0 to 1.")
        if self.budget < 0:
            raise ConfigError(f"budget={self.budget} is out of range; use bytes, for example 64MB.")

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        if self.scope == "model":
            return self._plan_together(layers, self.budget)
        share = max(1, self.budget // max(1, len(layers))) if self.budget else 0
        return [plan for layer in layers for plan in self._plan_together([layer], share)]

    def low_tier(self, k_bits: Groups, v_bits: Groups) -> tuple[Groups, Groups] | None:
        """See `Policy`."""
        return self.low if isinstance(self.low, tuple) else None

    @property
    def limit(self) -> int:
        """See `Policy`."""
        return self.budget

    def idle(self) -> Mapping[str, str]:
        """See `Policy`."""
        none = "without a low tier; add low=k3v2"
        return {} if isinstance(self.low, tuple) else {"high": none}

    def _plan_together(self, layers: Sequence[LayerSlots], nbytes: int) -> list[Tiers]:
        import numpy as np

        from leankv_mlx.policies.shares import not_above, ranks_in_rows, slots_per_head

        shape = (sum(x.tiers.shape[0] for x in layers), max(x.tiers.shape[1] for x in layers))
        scores, tiers = np.full(shape, -np.inf, np.float32), np.full(shape, DROP, np.int8)
        prices = np.zeros((2, shape[0]))  # of a slot of each head, in each tier
        row = 0
        for layer in layers:
            heads, slots = layer.tiers.shape
            used = layer.tiers != DROP
            scores[row : row + heads, :slots] = np.where(used, layer.scores, -np.inf)
            tiers[row : row + heads, :slots] = layer.tiers
            prices[:, row : row + heads] = layer.slot_nbytes
            row += heads
        room = self._room(layers, float(prices[0].sum()), nbytes)
        share = self.high if isinstance(self.low, tuple) else 1.0
        place = ranks_in_rows(scores)
        high = slots_per_head(scores, prices[0], share * room)
        low = np.zeros_like(high)
        if share < 1:
            behind = np.where(place < high[:, None], -np.inf, scores)
            low = slots_per_head(behind, prices[1], (1 - share) * room)
        wanted = np.where(
            place < high[:, None], HIGH, np.where(place < (high + low)[:, None], LOW, DROP)
        )
        plan, plans, row = not_above(tiers, wanted), [], 0
        for layer in layers:
            heads, slots = layer.tiers.shape
            plans.append(plan[row : row + heads, :slots])
            row += heads
        return plans

    def _room(self, layers: Sequence[LayerSlots], price: float, nbytes: int) -> float:
        """Bytes for slots; `price` is that of one slot of every head."""
        fixed = sum(layer.fixed_nbytes for layer in layers)
        share = sum(layer.fp16_nbytes for layer in layers) / self.ratio - fixed
        room = max(LEAST_SLOTS * price, share)
        if not nbytes:
            return room
        # Until the next plan queries may come, and a block of new tokens before others go.
        growth = sum(layer.growth_nbytes for layer in layers) + BLOCK_SLOTS * price
        return min(room, max(0, nbytes - fixed - growth))
