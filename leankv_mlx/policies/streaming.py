"""policy=streaming: what stands at the beginning and what came last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leankv_mlx.policies.policy import DROP, Dropping, LayerSlots

if TYPE_CHECKING:
    from leankv_mlx.policies.policy import Tiers


@dataclass(frozen=True)
class Streaming(Dropping):
    """Sink tokens and window only (StreamingLLM, https://arxiv.org/abs/2309.17453, section 3.2)."""

    name: ClassVar[str] = "streaming"
    scored: ClassVar[bool] = False

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        import numpy as np

        return [np.full_like(layer.tiers, DROP) for layer in layers]
