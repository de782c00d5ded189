"""policy=keep_all: no token ever goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leankv_mlx.policies.policy import LayerSlots, Policy

if TYPE_CHECKING:
    from leankv_mlx.policies.policy import Tiers


@dataclass(frozen=True)
class KeepAll(Policy):
    """Every token stays as it is."""

    name: ClassVar[str] = "keep_all"

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        return [layer.tiers for layer in layers]
