"""Activation sparsity: input channels that hardly count are left out, and their weights not read.

`Sparsity` does it, by `Thresholds` that were calibrated for the model; `measure` has what a
calibration looks at, and `allocation` what it decides.
"""

from leankv_mlx.projections.sparsity.sparsity import Sparsity
from leankv_mlx.projections.sparsity.thresholds import By, Thresholds, find, save

__all__ = ["By", "Sparsity", "Thresholds", "find", "save"]
