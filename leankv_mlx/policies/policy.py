"""What a policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from leankv_mlx.settings import Groups, check_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]
    Tiers = NDArray[np.int8]

When = Literal["prompt", "chunk"]

HIGH, LOW, DROP = 0, 1, -1
"""Tiers. A slot never moves up: what a tier has forgotten is gone."""


@dataclass(frozen=True)
class LayerSlots:
    """The stored tokens of one layer.

    Attributes:
        scores: significance of each slot, float32 [H, S].
        tiers: HIGH or LOW, DROP where a head has no such slot, int8 [H, S].
        slot_nbytes: bytes of a slot of each head in the high and in the low tier (the same where
            there is none), side data included, [2, H]; 0 for heads that hold no slots.
        fixed_nbytes: bytes of the layer that no policy touches: sink tokens, a full window,
            centers, observed queries.
        growth_nbytes: what further queries may add to that.
        fp16_nbytes: what an uncompressed fp16 cache of all tokens so far would hold.
        tokens: tokens so far, dropped ones included.
    """

    scores: Scores
    tiers: Tiers
    slot_nbytes: NDArray[np.float64]
    fixed_nbytes: int
    growth_nbytes: int
    fp16_nbytes: int
    tokens: int


@dataclass(frozen=True)
class Policy(ABC):
    """Where slots go. A policy is a frozen dataclass: its fields are its settings, each with a
    default and a type that `leankv_mlx.settings` reads, and wrong ones are a `ConfigError`.

    It plans over all heads at once, in NumPy and without a loop over them; moving the slots is the
    cache's work.
    """

    name: ClassVar[str]
    """As in `policy=NAME`."""
    drops: ClassVar[bool] = False
    """Whether tokens may go; a cache keeps their positions, and queries to judge them by, if so."""
    scored: ClassVar[bool] = False
    """Whether it looks at the scores."""

    def __post_init__(self) -> None:
        check_words(self)

    @abstractmethod
    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """The new tier of every slot, int8 [H, S] for each layer; never above the present one."""

    def low_tier(self, k_bits: Groups, v_bits: Groups) -> tuple[Groups, Groups] | None:
        """Bits of keys and values of the low tier, from those of the high one; None for none."""
        return None

    @property
    def by_chunk(self) -> bool:
        """Whether it acts before each chunk of a prompt, too, and not only once all of it is in."""
        return False

    @property
    def limit(self) -> int:
        """Bytes that all layers together keep to, whatever is generated; 0 for no such limit."""
        return 0

    def idle(self) -> Mapping[str, str]:
        """Fields that do nothing beside the others, with what they do without and what would help:
        "without a low tier; add low=k3v2"."""
        return {}


@dataclass(frozen=True)
class Dropping(Policy):
    """A policy under which tokens go.

    Attributes:
        at: when it acts: once the "prompt" is in, or also before each "chunk" of it.
    """

    drops: ClassVar[bool] = True
    scored: ClassVar[bool] = True

    at: When = field(default="prompt", kw_only=True)

    @property
    def by_chunk(self) -> bool:
        """See `Policy`."""
        return self.at == "chunk"
