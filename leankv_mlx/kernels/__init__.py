"""Operations on compressed sequences, one per file, and the backends that compute them."""

from leankv_mlx.kernels.backends import available_backends, resolve_backend
from leankv_mlx.kernels.types import (
    MAX_DECODE_TOKENS,
    Attention,
    Backend,
    Centers,
    Mask,
    PrefillInputs,
    Rotations,
    Rows,
    Tier,
    View,
)

__all__ = [
    "MAX_DECODE_TOKENS",
    "Attention",
    "Backend",
    "Centers",
    "Mask",
    "PrefillInputs",
    "Rotations",
    "Rows",
    "Tier",
    "View",
    "available_backends",
    "resolve_backend",
]
