"""The GPU backends: one source in metal/, launched through Metal, through CUDA or by the tests."""

from leankv_mlx.kernels.gpu.backend import make_backend
from leankv_mlx.kernels.gpu.launch import Kernel, Launcher

__all__ = ["Kernel", "Launcher", "make_backend"]
