"""The products of a layer with its quantized weights, and what goes with them in one operation."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from leankv_mlx.errors import ShapeError
from leankv_mlx.projections.backends import resolve_backend
from leankv_mlx.projections.types import Arguments, Backend, Gate, Keep, Norm, Projected
from leankv_mlx.projections.weight import FLOATS, Weight

__all__ = ["Gate", "Keep", "Norm", "Projected", "project"]


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
    inputs = Arguments(
        x, weights, [None] * len(weights) if biases is None else biases, norm, keep, residual, gate
    )
    _check(inputs)
    return (backend or resolve_backend()).project(inputs)


def _check(inputs: Arguments) -> None:
    x, weights, gate = inputs.x, inputs.weights, inputs.gate
    channels = x.shape[-1] if x.ndim else 0
    if not weights or any([w.inputs != channels for w in weights]) or x.dtype not in FLOATS:
        raise ShapeError(
            f"[project] expected floats [..., K] for weights of the same K, got {x.dtype} "
            f"{x.shape} for K of {[w.inputs for w in weights]}."
        )
    if gate is not None and (len(weights) != 2 or weights[0].outputs != weights[1].outputs):
        raise ShapeError(
            "[project] a gate takes two weights of the same N, got N of "
            f"{[w.outputs for w in weights]}."
        )
    if len(inputs.biases) != len(weights):
        raise ShapeError("[project] expected a bias [N] or None for each weight.")
    for weight, bias in zip(weights, inputs.biases, strict=True):
        _expect("a bias", bias, (weight.outputs,))
    if inputs.residual is not None:
        if len(weights) != (1 if gate is None else 2):
            raise ShapeError("[project] a residual goes with one output.")
        _expect("a residual", inputs.residual, (*x.shape[:-1], weights[-1].outputs))
    if inputs.norm is not None:
        _expect("a norm", inputs.norm.weight, (channels,))
    if inputs.keep is not None:
        _expect("norms", inputs.keep.norms, (channels,))
        if not inputs.keep.threshold >= 0:
            raise ShapeError(f"[project] expected a threshold >= 0, got {inputs.keep.threshold}.")


def _expect(what: str, given: mx.array | None, shape: tuple[int, ...]) -> None:
    if given is not None and (given.shape != shape or given.dtype not in FLOATS):
        raise ShapeError(
            f"[project] expected {what} of floats {shape}, got {given.dtype} {given.shape}."
        )
