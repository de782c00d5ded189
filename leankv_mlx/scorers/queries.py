"""scores=queries: a prompt with one question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leankv_mlx.scorers.pooled import Pooled


@dataclass(frozen=True)
class Queries(Pooled):
    """The attention of the last queries of the prompt (LeanKV, https://arxiv.org/abs/2412.03131,
    section 4)."""

    name: ClassVar[str] = "queries"
