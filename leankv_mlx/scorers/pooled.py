"""Scorers whose scores are those of neighbourhoods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from leankv_mlx.errors import ConfigError
from leankv_mlx.scorers.scorer import Scorer

if TYPE_CHECKING:
    from leankv_mlx.scorers.pooling import Positions, Scores


@dataclass(frozen=True)
class Pooled(Scorer):
    """A score is the largest among neighbours (SnapKV, https://arxiv.org/abs/2404.14469, section
    4): alone, a match keeps the words of a question and loses the value beside them.

    Attributes:
        pooling: tokens, an odd number: so many neighbours, the token itself included.

    Raises:
        ConfigError: a value is out of range.
    """

    pooling: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.pooling <= 255 or self.pooling % 2 == 0:
            raise ConfigError(f"pooling={self.pooling} is out of range; use an odd number to 255.")

    def judge(self, received: Scores, positions: Positions) -> Scores:
        """See `Scorer`."""
        from leankv_mlx.scorers.pooling import pooled

        return pooled(received, positions, self.pooling)
