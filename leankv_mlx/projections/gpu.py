"""`project` on a GPU.

Up to 8 rows, those of decoding, are one launch that reads the codes of the channels which take part
and no others (`kernels/gpu/project.py`). More rows are a prefill, which takes all channels: a
launch makes numbers of a weight, and MLX's own product multiplies by those. Beside the one copy of
the weights there is one of them as numbers then, for the time of its product.

MLX's own `quantized_matmul` is a good kernel on a GPU, and its layout cannot leave out channels. So
weights are relaid there for a model that computes with `Keep`, and stay as they are for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.gpu import Launcher, devices
from leankv_mlx.kernels.gpu.project import Project
from leankv_mlx.projections.reference import finished, project_ops, taken
from leankv_mlx.projections.types import Arguments, Backend, Keep, Projected
from leankv_mlx.projections.weight import relay

_TOLERANCE = 1e-3
"""Far above rounding, and far below what any mistake would cause."""


def make(name: str) -> Backend:
    """The backend of a device in `kernels.gpu.devices.DEVICES`.

    Raises:
        BackendUnavailableError: there is no such device, MLX computes on another one, or the
            kernels do not compile or compute the right thing here.
    """
    devices.require(name)
    return _checked(name)


@lru_cache
def _checked(name: str) -> Backend:
    backend = Backend(name, GpuProject(devices.launcher(name)))
    check(backend)
    return backend


@dataclass(frozen=True)
class GpuProject:
    """GPU implementation of `project`, by whatever launches its kernels."""

    launch: Launcher

    def __call__(self, inputs: Arguments) -> Projected:
        """See `projections.project.project`."""
        kernel = Project(self.launch)
        x = inputs.x.reshape(-1, inputs.x.shape[-1])
        if not all(kernel.takes(len(x), [weight]) for weight in inputs.weights):
            return self._many(inputs)
        if inputs.gate == "gelu" or not kernel.takes(len(x), inputs.weights):
            return self._each(x, inputs)
        residual = None if inputs.residual is None else inputs.residual.reshape(len(x), -1)
        outs, read = kernel(
            x,
            inputs.weights,
            x.dtype,
            biases=inputs.biases,
            norm=inputs.norm,
            keep=inputs.keep,
            residual=residual,
            gate=inputs.gate,
        )
        return Projected([out.reshape(*inputs.x.shape[:-1], -1) for out in outs], read)

    def _each(self, x: mx.array, inputs: Arguments) -> Projected:
        """A launch for each weight, what follows in MLX ops: weights of several kinds, and the
        exact GELU, as a GPU has no error function."""
        each = [
            Project(self.launch)(
                x, [weight], mx.float32, biases=[None], norm=inputs.norm, keep=inputs.keep
            )
            for weight in inputs.weights
        ]
        outs = [out.reshape(*inputs.x.shape[:-1], -1) for (out,), _ in each]
        return finished(outs, each[0][1], inputs)

    def _many(self, inputs: Arguments) -> Projected:
        """Products in the dtype of the inputs, as MLX's own are; their sums are in float32."""
        x, read = taken(inputs)
        dtype, unpack = inputs.x.dtype, Project(self.launch).unpack
        outs = [x.astype(dtype) @ unpack(weight, dtype) for weight in inputs.weights]
        return finished(outs, read, inputs)


def check(backend: Backend) -> None:
    """The smallest use of the kernels, beside the reference.

    Raises:
        BackendUnavailableError: an error, or a wrong result.
    """
    try:
        difference = max(_difference(backend, rows) for rows in (1, 9))
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).split("\n")), "")
        raise BackendUnavailableError(f"the products do not run on this device: {line}") from error
    if not difference < _TOLERANCE:  # NaN counts
        raise BackendUnavailableError(
            f"the products are others than those of the reference here (by {difference:.1e})."
        )


def _difference(backend: Backend, rows: int) -> float:
    """In units of the largest output."""
    keys = mx.random.split(mx.random.key(0), 2)
    weight = relay(*mx.quantize(mx.random.normal((72, 128), key=keys[0]), 64, 4), 64, 4)
    x = mx.random.normal((rows, 128), key=keys[1])
    inputs = Arguments(x, [weight], [None], None, Keep(0.5), None, None)
    ours, reference = (project(inputs).outs[0] for project in (backend.project, project_ops))
    return float(mx.abs(ours - reference).max() / mx.abs(reference).max())
