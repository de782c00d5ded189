"""What multiplies a model's quantized weights, as the setting `projections` says."""

from __future__ import annotations

from mlx import nn

from leankv_mlx.config import Products
from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.mlx_lm.fused import fuse
from leankv_mlx.projections import Inputs, Projections, why_not_native


def is_native(setting: Products) -> bool:
    """Whether the native products are used: "auto" takes them where they run.

    Raises:
        BackendUnavailableError: they are asked for and do not run here.
    """
    if setting == "mlx":
        return False
    reason = why_not_native()
    if reason and setting == "native":
        raise BackendUnavailableError(f"projections=native does not run here: {reason}")
    return not reason


def projections_of(
    model: nn.Module, setting: Products, lazy: bool = False, inputs: Inputs | None = None
) -> Projections:
    """A use of the model's layers as the setting says, not started.

    Args:
        inputs: what is done with the inputs of native products.

    Raises:
        BackendUnavailableError: native products are asked for and do not run here.
    """
    return Projections(model, is_native(setting), inputs, fuse, lazy)
