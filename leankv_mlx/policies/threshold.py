"""policy=threshold: tiers by how much attention a token gets of what there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leankv_mlx.errors import ConfigError
from leankv_mlx.policies.policy import DROP, HIGH, LOW, Dropping, LayerSlots
from leankv_mlx.settings import Groups, LowBits, check_low

if TYPE_CHECKING:
    from leankv_mlx.policies.policy import Tiers

_STEP_DOWN = {8: 4, 4: 3, 3: 2, 2: 2}, {8: 4, 4: 2, 3: 2, 2: 2}
"""Bits of keys and of values in the low tier, from those of the high one: k8v4 -> k4v2 as in the
LeanKV paper, k4v4 -> k3v2."""


@dataclass(frozen=True)
class Threshold(Dropping):
    """Tiers by significance relative to 1/N (LeanKV, https://arxiv.org/abs/2412.03131, section 4).

    Attributes:
        low: bits of the low tier; "auto" is a step below those of the high one, "none" for a single
            tier, in which what would be low stays high.
        alpha_high: above alpha_high / N a token stays in the high tier.
        alpha_low: above alpha_low / N it goes to the low one; below it is dropped.

    Raises:
        ConfigError: a value is out of range.
    """

    name: ClassVar[str] = "threshold"

    low: LowBits = "auto"
    alpha_high: float = 1.0
    alpha_low: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_low(self.low)
        if not 0 <= self.alpha_low <= self.alpha_high < math.inf:
            raise ConfigError(
                f"alpha_low={self.alpha_low:g} and alpha_high={self.alpha_high:g} make no sense; "
                "use 0 <= alpha_low <= alpha_high."
            )

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        import numpy as np

        from leankv_mlx.policies.shares import not_above

        plans = []
        for layer in layers:
            relative = layer.scores * np.float32(layer.tokens)
            wanted = np.where(
                relative > self.alpha_high, HIGH, np.where(relative > self.alpha_low, LOW, DROP)
            )
            plans.append(not_above(layer.tiers, wanted))
        return plans

    def low_tier(self, k_bits: Groups, v_bits: Groups) -> tuple[Groups, Groups] | None:
        """See `Policy`."""
        if isinstance(self.low, tuple):
            return self.low
        if self.low == "none":
            return None
        return _stepped(k_bits, _STEP_DOWN[0]), _stepped(v_bits, _STEP_DOWN[1])


def _stepped(bits: Groups, down: dict[int, int]) -> Groups:
    if isinstance(bits, int):
        return down[bits]
    return tuple(down.get(group, 0) for group in bits)
