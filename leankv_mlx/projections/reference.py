"""The operation in MLX ops, on any device: what all other implementations are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx import nn

from leankv_mlx.projections.types import Arguments, Backend, Projected
from leankv_mlx.projections.weight import restore

_GATES = {"silu": nn.silu, "gelu": nn.gelu, "gelu_approx": nn.gelu_approx}


def make() -> Backend:
    """The backend."""
    return Backend("reference", project_ops)


def project_ops(inputs: Arguments) -> Projected:
    """Ops-based reference implementation of `project`."""
    x, read = taken(inputs)
    outs = []
    for weight in inputs.weights:
        codes, scales, zeros = restore(weight)
        dense = mx.dequantize(
            codes, scales.astype(mx.float32), zeros.astype(mx.float32), weight.group, weight.bits
        )
        outs.append(x @ dense.T)
    return finished(outs, read, inputs)


def taken(inputs: Arguments) -> tuple[mx.array, mx.array | None]:
    """The inputs that are multiplied, float32 [..., K], and `Projected.read`."""
    x = inputs.x.astype(mx.float32)
    if inputs.norm is not None:
        x = mx.fast.rms_norm(x, inputs.norm.weight.astype(mx.float32), inputs.norm.eps)
    if inputs.keep is None:
        return x, None
    size = mx.abs(x) if inputs.keep.norms is None else mx.abs(x) * inputs.keep.norms
    chosen = ~(size <= inputs.keep.threshold)
    return mx.where(chosen, x, 0), chosen.sum().astype(mx.int32)


def finished(products: Sequence[mx.array], read: mx.array | None, inputs: Arguments) -> Projected:
    """What follows the products [..., N] of the weights: biases, gate, residual, in float32."""
    outs = [
        out.astype(mx.float32) if bias is None else out + bias.astype(mx.float32)
        for out, bias in zip(products, inputs.biases, strict=True)
    ]
    if inputs.gate is not None:
        first, second = outs
        outs = [_GATES[inputs.gate](first) * second]
    if inputs.residual is not None:
        outs = [outs[0] + inputs.residual.astype(mx.float32)]
    return Projected([out.astype(inputs.x.dtype) for out in outs], read)
