"""The products of a layer with its quantized weights, and what goes with them in one operation."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from leankv_mlx.errors import ShapeError
from leankv_mlx.projections.backends import resolve_backend
from leankv_mlx.projections.types import Backend, Gate, Inputs, Keep, Norm, Projected
from leankv_mlx.projections.weight import Weight

__all__ = ["Gate", "Keep", "Norm", "Projected", "project"]

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def project(
    x: mx.array,
    weights: Sequence[Weight],
    *,
    biases: Sequence[mx.array | None] | None = None,
    norm: Norm | None = None,
    keep: Keep | None = None,
    residual: mx.array | None = None,
    gate: Gate | None = None,
    backend: Backend | None = None,
) -> Projected:
    """x by the transpose of each weight; sums are in float32.

    Args:
        x: inputs [..., K], float32, float16 or bfloat16.
        weights: of the same K.
        biases: [N] of each weight, or None.
        norm: applied to the inputs first.
        keep: leave out the channels that hardly count, after the norm.
        residual: [..., N], added to the output; with one output only.
        gate: with two weights of the same N, gate(first output) * second output is the only output.
        backend: who computes it; None for the best that runs here.

    Raises:
        ShapeError: something does not fit the weights.
    """
    inputs = Inputs(x, weights, biases or [None] * len(weights), norm, keep, residual, gate)
    _check(inputs)
    return (backend or resolve_backend()).project(inputs)


def _check(inputs: Inputs) -> None:
    x, weights = inputs.x, inputs.weights
    channels = x.shape[-1] if x.ndim else 0
    if x.dtype not in _DTYPES or not weights or any(w.inputs != channels for w in weights):
        raise ShapeError(
            f"[project] expected floats [..., K] for weights of the same K, got {x.dtype} {x.shape} "
            f"for K of {[w.inputs for w in weights]}."
        )
    outputs = [w.outputs for w in weights]
    if inputs.gate is not None:
        if len(outputs) != 2 or outputs[0] != outputs[1]:
            raise ShapeError(
                f"[project] a gate takes two weights of the same N, got N of {outputs}."
            )
        outputs = outputs[1:]
    if [b.shape for b in inputs.biases if b is not None] != [
        (w.outputs,) for w, b in zip(weights, inputs.biases, strict=True) if b is not None
    ]:
        raise ShapeError("[project] expected a bias [N] or None for each weight.")
    residual, last = inputs.residual, (*x.shape[:-1], outputs[-1])
    if residual is not None and (len(outputs) != 1 or residual.shape != last):
        raise ShapeError(
            f"[project] expected one output and a residual {last}, got {len(outputs)} and "
            f"{residual.shape}."
        )
    norms = (inputs.norm and inputs.norm.weight, inputs.keep and inputs.keep.norms)
    if any(given is not None and given.shape != (channels,) for given in norms):
        raise ShapeError(f"[project] expected norms [{channels}].")
