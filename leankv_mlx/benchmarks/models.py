"""Models with random weights and the caches that their steps run on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.benchmarks.fill import DTYPES
from leankv_mlx.benchmarks.shapes import DEFAULT_SHAPE, Heads, Shape
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.mlx_lm.attachment import attach, make_caches
from leankv_mlx.mlx_lm.stock import random_model, stock_cache


@dataclass
class Models:
    """A shape's models by dtype, each made when it is first asked for."""

    shape: Shape
    _made: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def heads(self) -> Heads:
        """Of each layer."""
        return Heads(self.shape.query_heads, self.shape.kv_heads, self.shape.head_dim)

    def of(self, dtype: str) -> nn.Module:
        """The model in a dtype of DTYPES."""
        if dtype not in self._made:
            self._made[dtype] = random_model(self.shape.config(), DTYPES[dtype])
        return self._made[dtype]

    def check_memory(self, dtypes: Sequence[str], tokens: int, compressed: int) -> None:
        """Refuse what would not fit.

        Raises:
            UsageError: models and caches of the dtypes need more than the machine's memory.
        """
        shape = self.shape
        row = 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens
        size = sum(DTYPES[dtype].size for dtype in dtypes)
        needed = size * (shape.parameters + row) + 2 * (compressed + 1) * row
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > 0.8 * there:
            raise UsageError(
                f"{shape.name} at {tokens} tokens needs some {needed / 1e9:.0f} GB for all that is "
                f"compared and the machine has {there / 1e9:.0f}; use a smaller --tokens or a "
                f"--shape with fewer layers, such as {DEFAULT_SHAPE}."
            )


def stock_caches(shape: Shape, bits: int | None = None) -> list[Any]:
    """mlx-lm's own caches, one per layer."""
    return [stock_cache(bits) for _ in range(shape.layers)]


@contextmanager
def compressed_caches(
    model: nn.Module, configs: Mapping[str, CompressionConfig]
) -> Iterator[dict[str, list[Any]]]:
    """Compressed caches for each config; the model attends to them inside of the block."""
    with ExitStack() as stack:
        made = {}
        for name, config in configs.items():
            stack.enter_context(attach(model, config))
            made[name] = make_caches(model)
        yield made


def step(model: nn.Module, caches: list[Any]) -> Callable[[], object]:
    """Decode one token."""
    token = mx.array([[1]])

    def run() -> None:
        mx.eval(model(token, cache=caches))

    return run
