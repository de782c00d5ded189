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
    """Plain loops: a decode step comes here four times a layer."""
    x, weights = inputs.x, inputs.weights
    shape = x.shape
    channels, last = (shape[-1], weights[-1].outputs) if shape and weights else (0, 0)
    fits = channels > 0 and x.dtype in _DTYPES
    for weight in weights:
        fits = fits and weight.inputs == channels
    if not fits:
        raise ShapeError(
            "[project] expected floats [..., K] for weights of the same K, got "
            f"{x.dtype} {shape} for K of {[w.inputs for w in weights]}."
        )
    for weight, bias in zip(weights, inputs.biases, strict=True):
        if bias is not None and bias.shape != (weight.outputs,):
            raise ShapeError("[project] expected a bias [N] or None for each weight.")
    outs = len(weights)
    if inputs.gate is not None:
        if outs != 2 or weights[0].outputs != last:
            raise ShapeError(
                "[project] a gate takes two weights of the same N, got N of "
                f"{[w.outputs for w in weights]}."
            )
        outs = 1
    residual = inputs.residual
    if residual is not None and (outs != 1 or residual.shape != (*shape[:-1], last)):
        raise ShapeError(
            f"[project] expected one output and a residual {(*shape[:-1], last)}, got {outs} and "
            f"{residual.shape}."
        )
    norms = (inputs.norm and inputs.norm.weight, inputs.keep and inputs.keep.norms)
    for given in norms:
        if given is not None and given.shape != (channels,):
            raise ShapeError(f"[project] expected norms [{channels}].")
