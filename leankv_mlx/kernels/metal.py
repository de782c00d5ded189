"""The Metal backend: the sources in metal/, compiled by MLX for the Apple GPU."""

from functools import lru_cache

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.gpu import make_backend
from leankv_mlx.kernels.gpu.geometry import tuner
from leankv_mlx.kernels.gpu.launch import CUBIC, MlxLauncher
from leankv_mlx.kernels.gpu.probe import check
from leankv_mlx.kernels.types import Backend


def make() -> Backend:
    """The backend.

    Raises:
        BackendUnavailableError: there is no Metal device, MLX computes on another one, or the
            kernels do not compile or compute the right thing here.
    """
    if not mx.metal.is_available():
        raise BackendUnavailableError("MLX finds no Metal device here.")
    if mx.default_device().type != mx.DeviceType.gpu:
        raise BackendUnavailableError("MLX computes on another device than the GPU.")
    return _checked()


@lru_cache(maxsize=1)
def launcher() -> MlxLauncher:
    """What launches the kernels on this device."""
    device = str(mx.device_info().get("device_name", "unknown"))
    return MlxLauncher(mx.fast.metal_kernel, CUBIC, tuner("metal", device))


@lru_cache(maxsize=1)
def _checked() -> Backend:
    backend = make_backend("metal", launcher())
    check(backend)
    return backend
