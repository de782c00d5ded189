"""The native CPU backend: primitives of the extension `leankv_mlx._native` (see native/)."""

from __future__ import annotations

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import cpu
from leankv_mlx.projections.types import Arguments, Backend, Projected


def make() -> Backend:
    """The backend.

    Raises:
        BackendUnavailableError: the extension is not there or does not fit, or MLX computes on
            another device.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        raise BackendUnavailableError("MLX computes on another device than the CPU.")
    cpu.load()
    return Backend("cpu", project_native)


def project_native(inputs: Arguments) -> Projected:
    """Native implementation of `project`."""
    keep = inputs.keep
    norms = None if keep is None or keep.norms is None else keep.norms.astype(mx.float32)
    outs = cpu.load().project(
        inputs.x,
        [weight.native for weight in inputs.weights],
        list(inputs.biases),
        inputs.norm,
        None if keep is None else keep.threshold,
        norms,
        inputs.residual,
        inputs.gate,
    )
    return Projected(outs) if keep is None else Projected(outs[:-1], outs[-1])
