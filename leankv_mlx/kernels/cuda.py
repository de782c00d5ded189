"""The CUDA backend: the sources in metal/, compiled by MLX for an NVIDIA GPU."""

from functools import lru_cache

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.gpu import make_backend
from leankv_mlx.kernels.gpu.geometry import tuner
from leankv_mlx.kernels.gpu.launch import SHUFFLE, MlxLauncher
from leankv_mlx.kernels.gpu.probe import check
from leankv_mlx.kernels.types import Backend


def make() -> Backend:
    """The backend.

    Raises:
        BackendUnavailableError: there is no CUDA device, MLX computes on another one, or the
            kernels do not compile or compute the right thing here.
    """
    if not mx.cuda.is_available():
        raise BackendUnavailableError("MLX finds no CUDA device here, or is its CPU build.")
    if mx.default_device().type != mx.DeviceType.gpu:
        raise BackendUnavailableError("MLX computes on another device than the GPU.")
    return _checked()


@lru_cache(maxsize=1)
def launcher() -> MlxLauncher:
    """What launches the kernels on this device."""
    device = str(mx.device_info().get("device_name", "unknown"))
    return MlxLauncher(mx.fast.cuda_kernel, SHUFFLE, tuner("cuda", device))


@lru_cache(maxsize=1)
def _checked() -> Backend:
    backend = make_backend("cuda", launcher())
    check(backend)
    return backend
