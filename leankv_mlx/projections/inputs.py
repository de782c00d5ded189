"""The inputs of a model's layers: which of its weights share one, and what of it takes part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import mlx.core as mx

from leankv_mlx.projections.project import project
from leankv_mlx.projections.types import Gate, Keep, Norm
from leankv_mlx.projections.weight import Weight

Place = Literal["attention", "attention_out", "mlp", "mlp_out"]

PLACES: dict[str, Place] = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "qkv_proj": "attention",
    "o_proj": "attention_out",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "gate_up_proj": "mlp",
    "down_proj": "mlp_out",
}
"""What mlx-lm's models call the weights of an input."""


class Input(NamedTuple):
    """One input of one layer: what its weights there are multiplied with.

    Attributes:
        layer: number of the layer.
        place: "attention" is the input of queries, keys and values, "attention_out" that of the
            output projection, "mlp" that of gate and up, "mlp_out" that of down.
    """

    layer: int
    place: Place


class Inputs(Protocol):
    """What is done with inputs on their way into the products of an attached model.

    Attributes:
        watching: whether `saw` needs the inputs after the norm: costs an operation more.
    """

    watching: bool

    def keep(self, at: Input, rows: int) -> Keep | None:
        """Which channels of this input take part; None for all. Asked at every call."""

    def saw(self, at: Input, x: mx.array, weights: Sequence[Weight], read: mx.array | None) -> None:
        """A product was made (lazily).

        Args:
            x: [..., K], after the norm if `watching`.
            weights: those it was multiplied with, not always all that share the input.
            read: as `Projected.read`.
        """


def input_of(name: str) -> Input | None:
    """The input of a weight by its path in the model; None if it is none that `PLACES` names, such
    as the head: "model.layers.3.self_attn.q_proj" is `Input(3, "attention")`."""
    *path, last = name.split(".")
    layers = [int(part) for part in path if part.isdigit()]
    if last not in PLACES or len(layers) != 1:  # experts are numbered too
        return None
    return Input(layers[0], PLACES[last])


def products(
    inputs: Inputs | None,
    at: Input | None,
    x: mx.array,
    weights: Sequence[Weight],
    *,
    biases: Sequence[mx.array | None] | None = None,
    norm: Norm | None = None,
    residual: mx.array | None = None,
    gate: Gate | None = None,
) -> list[mx.array]:
    """`project` as the inputs of an attached model want it."""
    if inputs is None or at is None:
        return project(x, weights, biases=biases, norm=norm, residual=residual, gate=gate).outs
    if norm is not None and inputs.watching:
        x = mx.fast.rms_norm(x, norm.weight, norm.eps)
        norm = None
    keep = inputs.keep(at, x.size // x.shape[-1])
    outs, read = project(
        x, weights, biases=biases, norm=norm, keep=keep, residual=residual, gate=gate
    )
    inputs.saw(at, x, weights, read)
    return outs
