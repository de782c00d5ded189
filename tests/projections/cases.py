"""Inputs of products with quantized weights, and the implementations beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from leankv_mlx.projections import Backend, Keep, Norm, Weight, relay, resolve_backend
from tests.isas import isas, selected

FLOATS = (mx.float32, mx.float16, mx.bfloat16)

FACTORS: Mapping[str, Sequence[Any]] = {
    "bits": (2, 3, 4, 5, 6, 8),
    "group": (32, 64, 128),
    "outputs": (1, 16, 100, 128, 576, 900),
    "groups": (1, 2, 5, 9),
    "rows": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 32, 33, 64),
    "dtype": FLOATS,
    "scales": FLOATS,
    "keep": (None, 0.0, 0.7, 1e9, "norms"),
    "weights": ("one", "bias", "residual", "three", "silu", "gelu", "gelu_approx"),
    "norm": (False, True),
    "layout": ("plain", "columns", "leading axes"),
}

TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
"""In units of the largest value; the last two are a rounding of the output."""


def weight(outputs: int, inputs: int, group: int, bits: int, dtype: mx.Dtype) -> Weight:
    """A random one; values are about 1 / sqrt(inputs)."""
    values = mx.random.normal((outputs, inputs)) * inputs**-0.5
    return relay(*mx.quantize(values.astype(dtype), group, bits), group, bits)


def case(
    *,
    bits: int,
    group: int,
    outputs: int,
    groups: int,
    rows: int,
    dtype: mx.Dtype,
    scales: mx.Dtype,
    keep: float | str | None,
    weights: str,
    norm: bool,
    layout: str,
) -> dict[str, Any]:
    """Arguments of `project`; the same ones always give the same."""
    mx.random.seed(rows + 100 * bits + 1000 * outputs)
    inputs = group * groups
    x = mx.random.normal((inputs, rows) if layout == "columns" else (rows, inputs))
    x = x.astype(dtype).T if layout == "columns" else x.astype(dtype)
    if layout == "leading axes":
        x = x.reshape(1, rows, 1, inputs)
    made = [weight(outputs, inputs, group, bits, scales)]
    asked: dict[str, Any] = {"x": x, "weights": made}
    if weights == "three":
        made += [weight(n, inputs, 32, b, dtype) for n, b in ((40, 8), (outputs + 3, 4))]
    elif weights in ("silu", "gelu", "gelu_approx"):
        made.append(weight(outputs, inputs, 32, 4, mx.float16))
        asked["gate"] = weights
    if weights in ("bias", "silu"):
        asked["biases"] = [mx.random.normal((outputs,)).astype(scales), *[None] * (len(made) - 1)]
    if weights in ("residual", "gelu"):
        asked["residual"] = mx.random.normal((*x.shape[:-1], outputs)).astype(dtype)
    if norm:
        asked["norm"] = Norm((1 + 0.1 * mx.random.normal((inputs,))).astype(scales), 1e-5)
    if keep == "norms":
        asked["keep"] = Keep(0.5, mx.random.uniform(shape=(inputs,)))
    elif isinstance(keep, float):
        asked["keep"] = Keep(keep)
    return asked


@contextmanager
def _isa(name: str) -> Iterator[Backend]:
    with selected(name):
        yield resolve_backend("cpu")


IMPLEMENTATIONS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Any]]] = {
    "cpu": (isas, _isa),
}
"""One row for every implementation beside the reference: name -> (names of its variants if it runs
here, else none; a context in which the backend is that variant)."""


def variants() -> list[tuple[str, str]]:
    """(implementation, variant) of everything that runs here."""
    return [(name, v) for name, (names, _) in IMPLEMENTATIONS.items() for v in names()]
