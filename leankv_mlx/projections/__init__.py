"""Products with quantized weights: the operation, its layout, and what puts it into a model.

`project` is the operation; `relay` makes its weights of MLX's, and `restore` makes MLX's of them.
"""

from leankv_mlx.projections.backends import resolve_backend
from leankv_mlx.projections.project import project
from leankv_mlx.projections.types import Backend, Keep, Norm, Projected
from leankv_mlx.projections.weight import Weight, relay, restore, rows

__all__ = [
    "Backend",
    "Keep",
    "Norm",
    "Projected",
    "Weight",
    "project",
    "relay",
    "resolve_backend",
    "restore",
    "rows",
]
