"""Activation sparsity of a model that was loaded here: its own thresholds, and when they rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx import nn

from leankv_mlx.config import Products
from leankv_mlx.errors import CalibrationError, ConfigError
from leankv_mlx.mlx_lm.loading import fingerprint, folder_of
from leankv_mlx.mlx_lm.projecting import is_native
from leankv_mlx.projections import Input, inputs_of, report
from leankv_mlx.projections.sparsity import Sparsity, find
from leankv_mlx.settings import Sparse


def sparsity_of(model: nn.Module, sparse: Sparse, products: Products) -> Sparsity | None:
    """What a setting leaves out of a model; None for nothing.

    Args:
        products: what multiplies the weights.

    Raises:
        CalibrationError: the model was not calibrated for it, or not loaded by this package.
        ConfigError, BackendUnavailableError: MLX's own products cannot leave anything out.
    """
    if not sparse:
        return None
    if products == "mlx":
        raise ConfigError(
            f"sparse={sparse} does nothing with projections=mlx; use native ones, or drop it."
        )
    is_native("native")
    folder = folder_of(model)
    if folder is None:
        raise CalibrationError(
            f"sparse={sparse} needs the folder of the model, whose thresholds it takes; "
            "load it with leankv_mlx.mlx_lm.load."
        )
    found = find(fingerprint(folder), folder.name, sparse)
    if not found.inputs.items() <= _channels(model).items():
        raise CalibrationError(
            f"the thresholds for sparse={sparse} do not fit the layers of {folder.name}; run "
            f"leankv calibrate {sparse.name or 'NAME'} --sparse {sparse.share:g} with this model."
        )
    return Sparsity(found.keeps(sparse.share))


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A prompt is read with all channels inside of the block: what is stored of it does not depend
    on thresholds."""
    inputs = inputs_of(model)
    if isinstance(inputs, Sparsity):
        with inputs.resting():
            yield
    else:
        yield


def _channels(model: nn.Module) -> dict[Input, int]:
    """The inputs of a model that can leave something out, and how many channels each has."""
    modules: dict[str, Any] = dict(model.named_modules())
    layers = {row.at: modules[row.name] for row in report(model) if row.at and not row.reason}
    return {at: 32 * layer["weight"].shape[-1] // layer.bits for at, layer in layers.items()}
