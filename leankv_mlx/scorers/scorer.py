"""What a scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leankv_mlx.settings import check_words

if TYPE_CHECKING:
    from leankv_mlx.scorers.pooling import Positions, Scores


@dataclass(frozen=True)
class Scorer(ABC):
    """What tokens are judged by: whose attention counts, and what is made of it. A scorer is a
    frozen dataclass of settings, as a policy is.

    How much attention a token receives is computed in `leankv_mlx.sparsity`, beside the codes.
    """

    name: ClassVar[str]
    """As in `scores=NAME`."""
    repeats: ClassVar[bool] = False
    """Whose attention counts: that of the last queries of the prompt, and later of a reply; or that
    of a pass of its own, in which the model repeats what it read (`mlx_lm.repetition`)."""

    def __post_init__(self) -> None:
        check_words(self)

    @abstractmethod
    def judge(self, received: Scores, positions: Positions) -> Scores:
        """The significance of slots, float32 [H, S], from 0 to 1; 0 where there is no token.

        Args:
            received: attention that each received, float32 [H, S].
            positions: where its token stands, int32 [H, S], in any order; -1 for no token.
        """
