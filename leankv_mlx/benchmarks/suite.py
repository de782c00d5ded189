"""All parts of a benchmark and its JSON document."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leankv_mlx.benchmarks.attention import measure_attention
from leankv_mlx.benchmarks.encode import measure_encode
from leankv_mlx.benchmarks.masks import measure_masks
from leankv_mlx.benchmarks.models import Models
from leankv_mlx.benchmarks.policy import measure_policy
from leankv_mlx.benchmarks.prefill import measure_prefill
from leankv_mlx.benchmarks.projections import measure_projections
from leankv_mlx.benchmarks.settings import Advance, Row, Settings
from leankv_mlx.benchmarks.shapes import Shape, shape_of
from leankv_mlx.benchmarks.skip import measure_skip
from leankv_mlx.benchmarks.steps import measure_steps
from leankv_mlx.blas import bind
from leankv_mlx.evaluation.lab import machine as software
from leankv_mlx.kernels import resolve_backend


@dataclass
class Report:
    """What was measured; parts that were not asked for are empty."""

    machine: str
    backend: str
    attention: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    prefill: list[Row] = field(default_factory=list)
    encode: list[Row] = field(default_factory=list)
    skip: list[Row] = field(default_factory=list)
    masks: list[Row] = field(default_factory=list)
    policy: list[Row] = field(default_factory=list)
    projections: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return vars(self)


def run(settings: Settings, advance: Advance = lambda what: None) -> Report:
    """Measure what the settings ask for.

    Raises:
        UsageError, ConfigError, BackendUnavailableError: they are not understood, or do not fit
            this machine.
    """
    settings.check()
    shape = shape_of(settings.shape)
    backends = {config.backend for config in settings.configs(("k4v4",)).values()}
    report = Report(machine(), ", ".join(sorted(resolve_backend(name).name for name in backends)))
    if "attention" in settings.only:
        report.attention = measure_attention(settings, advance)
    if {"steps", "encode"} & {*settings.only}:
        models = Models(shape)
        if "steps" in settings.only:
            report.steps = measure_steps(settings, models, advance)
        if "encode" in settings.only:
            report.encode = measure_encode(settings, models, advance)
        del models
    if "prefill" in settings.only:
        shorter = _at_most(shape, settings.prefill_layers)
        report.prefill = measure_prefill(settings, Models(shorter), advance)
    if "skip" in settings.only:
        report.skip = measure_skip(settings, advance)
    if "masks" in settings.only:
        report.masks = measure_masks(settings, advance)
    if "policy" in settings.only:
        shorter = _at_most(shape, settings.prefill_layers)
        report.policy = measure_policy(settings, Models(shorter), advance)
    if "projections" in settings.only:
        report.projections = measure_projections(settings, advance)
    return report


def _at_most(shape: Shape, layers: int) -> Shape:
    """The shape with fewer layers: prefill does the same in each of them."""
    if shape.layers <= layers:
        return shape
    return shape.with_layers(layers)


def machine() -> str:
    """What ran this: no figure is comparable across machines."""
    return f"{_processor()}; {software()}, {bind().name or 'its own BLAS'}"


def _processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
