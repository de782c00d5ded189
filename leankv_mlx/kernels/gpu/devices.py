"""The GPUs that MLX knows: the sources in metal/, compiled for an Apple or an NVIDIA one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.gpu.backend import make_backend
from leankv_mlx.kernels.gpu.geometry import tuner
from leankv_mlx.kernels.gpu.launch import CUBIC, SHUFFLE, MlxLauncher
from leankv_mlx.kernels.gpu.probe import check
from leankv_mlx.kernels.types import Backend


@dataclass(frozen=True)
class Device:
    """One of MLX's ways to a GPU.

    Attributes:
        available: whether MLX finds such a device.
        missing: what is said where it does not.
        compile: makes a kernel of a source.
        strategy: from code to value; see `kernels.gpu.launch`.
    """

    available: Callable[[], bool]
    missing: str
    compile: Callable[..., Any]
    strategy: int


DEVICES = {
    "metal": Device(
        available=mx.metal.is_available,
        missing="MLX finds no Metal device here.",
        compile=mx.fast.metal_kernel,
        strategy=CUBIC,
    ),
    "cuda": Device(
        available=mx.cuda.is_available,
        missing="MLX finds no CUDA device here, or is its CPU build.",
        compile=mx.fast.cuda_kernel,
        strategy=SHUFFLE,
    ),
}


def make(name: str) -> Backend:
    """The backend of a device in `DEVICES`.

    Raises:
        BackendUnavailableError: there is no such device, MLX computes on another one, or the
            kernels do not compile or compute the right thing here.
    """
    require(name)
    return _checked(name)


def require(name: str) -> None:
    """Nothing, where MLX computes on a device in `DEVICES`.

    Raises:
        BackendUnavailableError: there is no such device, or MLX computes on another one.
    """
    device = DEVICES[name]
    if not device.available():
        raise BackendUnavailableError(device.missing)
    if mx.default_device().type != mx.DeviceType.gpu:
        raise BackendUnavailableError("MLX computes on another device than the GPU.")


@lru_cache
def launcher(name: str) -> MlxLauncher:
    """What launches the kernels on a device that is available."""
    device = DEVICES[name]
    model = str(mx.device_info().get("device_name", "unknown"))
    return MlxLauncher(device.compile, device.strategy, tuner(name, model))


@lru_cache
def _checked(name: str) -> Backend:
    backend = make_backend(name, launcher(name))
    check(backend)
    return backend
