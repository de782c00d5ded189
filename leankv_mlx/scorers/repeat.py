"""scores=repeat: a document that will be asked many things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leankv_mlx.scorers.pooled import Pooled


@dataclass(frozen=True)
class Repeat(Pooled):
    """The most attention of a pass in which the model is made to repeat the document (KVzip,
    https://arxiv.org/abs/2505.23416, section 3)."""

    name: ClassVar[str] = "repeat"
    repeats: ClassVar[bool] = True
