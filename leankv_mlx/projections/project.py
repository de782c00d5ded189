"""The products of a layer with its quantized weights, and what goes with them in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import mlx.core as mx
from mlx import nn

from leankv_mlx.projections.weight import Weight, restore

Gate = Literal["silu", "gelu", "gelu_approx"]

_GATES = {"silu": nn.silu, "gelu": nn.gelu, "gelu_approx": nn.gelu_approx}


class Norm(NamedTuple):
    """A root-mean-square norm of the inputs: weight [K], epsilon."""

    weight: mx.array
    eps: float


class Keep(NamedTuple):
    """Which input channels take part: those with |x| * norms > threshold (TEAL, arXiv 2408.14690;
    with norms of the weight's columns WINA, arXiv 2505.19427). A channel that does not counts as 0.

    Attributes:
        threshold: at least 0.
        norms: float32 [K]; None for 1.
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


def project(
    x: mx.array,
    weights: Sequence[Weight],
    *,
    biases: Sequence[mx.array | None] | None = None,
    norm: Norm | None = None,
    keep: Keep | None = None,
    residual: mx.array | None = None,
    gate: Gate | None = None,
) -> Projected:
    """x by the transpose of each weight; sums are in float32.

    Args:
        x: inputs [..., K].
        weights: of the same K.
        biases: [N] of each weight, or None.
        norm: applied to the inputs first.
        keep: leave out the channels that hardly count, after the norm.
        residual: [..., N], added to the output; with one weight only.
        gate: with two weights, gate(first output) * second output is the only output.
    """
    inputs = x.astype(mx.float32)
    if norm is not None:
        inputs = mx.fast.rms_norm(inputs, norm.weight.astype(mx.float32), norm.eps)
    read = None
    if keep is not None:
        size = mx.abs(inputs) if keep.norms is None else mx.abs(inputs) * keep.norms
        chosen = size > keep.threshold
        inputs, read = mx.where(chosen, inputs, 0), chosen.sum().astype(mx.int32)
    outs = []
    for weight, bias in zip(weights, biases or [None] * len(weights), strict=True):
        codes, scales, zeros = restore(weight)
        dense = mx.dequantize(
            codes, scales.astype(mx.float32), zeros.astype(mx.float32), weight.group, weight.bits
        )
        out = inputs @ dense.T
        outs.append(out if bias is None else out + bias.astype(mx.float32))
    if gate is not None:
        first, second = outs
        outs = [_GATES[gate](first) * second]
    if residual is not None:
        outs = [outs[0] + residual.astype(mx.float32)]
    return Projected([out.astype(x.dtype) for out in outs], read)
