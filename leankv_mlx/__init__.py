"""leankv-mlx: a compressed KV cache for MLX language models.

Names are resolved on first use, so importing this package imports neither mlx nor mlx-lm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leankv_mlx.cache import CompressedKVCache
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.errors import LeanKVError
    from leankv_mlx.mlx_lm import attach

_MODULES = {
    "CompressedKVCache": "leankv_mlx.cache",
    "CompressionConfig": "leankv_mlx.config",
    "LeanKVError": "leankv_mlx.errors",
    "attach": "leankv_mlx.mlx_lm",
}

__version__ = "0.1.0"
__all__ = ["CompressedKVCache", "CompressionConfig", "LeanKVError", "attach"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
