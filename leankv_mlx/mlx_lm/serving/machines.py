"""What several machines that run one model have to agree on; a single one agrees with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from leankv_mlx.mlx_lm.group import summed
from leankv_mlx.serving import Held

Told = TypeVar("Told")


class Machines:
    """The machines of a server. Every call of theirs has to be made by all, in the same order.

    Args:
        generator: mlx-lm's `ResponseGenerator`, whose messages these are.
    """

    def __init__(self, generator: Any) -> None:
        self.several: bool = generator._is_distributed
        self._leads: bool = generator._rank == 0
        self._share: Callable[[Any], Any] = generator._share_object

    def told(self, find: Callable[[], Told]) -> Told:
        """What the first machine finds; `find` is called on no other."""
        found: Told = self._share(find() if self._leads else None)
        return found

    def agree(self, number: int) -> bool:
        """Whether all have the same number."""
        if not self.several:
            return True
        mine = mx.array(number)
        most, least = mx.distributed.all_max(mine), mx.distributed.all_min(mine)
        return bool(most.item() == least.item())

    def total(self, held: Held) -> Held:
        """What all of them hold of the same sequences."""
        if not self.several:
            return held
        stream = mx.default_stream(mx.default_device())  # that of the model's steps, see `Loop`
        return summed(held, "used", "fp16", "shared", "allocated", stream=stream)
