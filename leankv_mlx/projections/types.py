"""What the operation takes besides its weights, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx

from leankv_mlx.projections.weight import Weight

Gate = Literal["silu", "gelu", "gelu_approx"]


class Norm(NamedTuple):
    """A root-mean-square norm of the inputs: weight [K], epsilon."""

    weight: mx.array
    eps: float


class Keep(NamedTuple):
    """Which input channels take part: those with |x| * norms > threshold (TEAL, arXiv 2408.14690;
    with norms of the weight's columns WINA, arXiv 2505.19427), and those that are no number. A
    channel that does not counts as 0.

    Attributes:
        threshold: at least 0.
        norms: [K], at least 0; None for 1.
    """

    threshold: float
    norms: mx.array | None = None


class Projected(NamedTuple):
    """One output [..., N] for each weight (with a gate one for both), in the dtype of the inputs.

    Attributes:
        read: with `Keep`, int32 []: input channels that took part, summed over the rows. None
            without.
    """

    outs: list[mx.array]
    read: mx.array | None = None


class Arguments(NamedTuple):
    """The arguments of `projections.project.project`, checked there. There are as many biases as
    weights."""

    x: mx.array
    weights: Sequence[Weight]
    biases: Sequence[mx.array | None]
    norm: Norm | None
    keep: Keep | None
    residual: mx.array | None
    gate: Gate | None


@dataclass(frozen=True)
class Backend:
    """One implementation of the operation."""

    name: str
    project: Callable[[Arguments], Projected]
