"""Products with quantized weights: the operation, its layout, and what puts it into a model.

`project` is the operation; `relay` makes its weights of MLX's, and `restore` makes MLX's of them.
`attach` makes the layers of a model compute through it.
"""

from leankv_mlx.projections.attach import (
    ProjectionReport,
    Projections,
    attach,
    inputs_of,
    is_attached,
    report,
    why_not_native,
)
from leankv_mlx.projections.backends import resolve_backend
from leankv_mlx.projections.inputs import Input, Inputs, input_of, products
from leankv_mlx.projections.layers import Relaid
from leankv_mlx.projections.project import project
from leankv_mlx.projections.types import Backend, Gate, Keep, Norm, Projected
from leankv_mlx.projections.weight import Weight, relay, restore, rows

__all__ = [
    "Backend",
    "Gate",
    "Input",
    "Inputs",
    "Keep",
    "Norm",
    "Projected",
    "ProjectionReport",
    "Projections",
    "Relaid",
    "Weight",
    "attach",
    "input_of",
    "inputs_of",
    "is_attached",
    "products",
    "project",
    "relay",
    "report",
    "resolve_backend",
    "restore",
    "rows",
    "why_not_native",
]
