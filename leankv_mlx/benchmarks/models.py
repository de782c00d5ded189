"""Models with random weights and the caches that their steps run on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from leankv_mlx.benchmarks.fill import DTYPES
from leankv_mlx.benchmarks.shapes import DEFAULT_SHAPE, Heads, Shape
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.fidelity import Chunk
from leankv_mlx.evaluation.sparsifying import thresholds
from leankv_mlx.mlx_lm.attachment import Attachment, attach, make_caches
from leankv_mlx.mlx_lm.stock import random_model, stock_cache
from leankv_mlx.projections.sparsity import Sparsity
from leankv_mlx.settings import Sparse

_BITS, _GROUP = 4, 32
_TOKENS = 64  # that thresholds of a random model are found on


@dataclass
class Models:
    """A shape's models by dtype, each made when it is first asked for.

    Attributes:
        quantized: whether their weights have 4 bits.
    """

    shape: Shape
    quantized: bool = False
    _made: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def heads(self) -> Heads:
        """Of each layer."""
        return Heads(self.shape.query_heads, self.shape.kv_heads, self.shape.head_dim)

    def of(self, dtype: str) -> nn.Module:
        """The model in a dtype of DTYPES."""
        if dtype not in self._made:
            model = self._made[dtype] = random_model(self.shape.config(), DTYPES[dtype])
            if self.quantized:
                nn.quantize(model, _GROUP, _BITS)
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


class Made(NamedTuple):
    """Caches, and what they were made by."""

    attachment: Attachment
    caches: list[Any]


@contextmanager
def attached(
    model: nn.Module, configs: Mapping[str, CompressionConfig]
) -> Iterator[dict[str, Made]]:
    """The model attends to compressed caches of each config inside of the block. What a config
    leaves out of its products follows from random tokens."""
    with ExitStack() as stack:
        made = {}
        for name, config in configs.items():
            sparsity = _sparsity(model, config.sparse.share) if config.sparse else None
            attachment = stack.enter_context(attach(model, config, sparsity))
            made[name] = Made(attachment, make_caches(model))
        yield made


@contextmanager
def compressed_caches(
    model: nn.Module, configs: Mapping[str, CompressionConfig]
) -> Iterator[dict[str, list[Any]]]:
    """The caches alone, of a model whose products are whole."""
    whole = {name: replace(config, sparse=Sparse()) for name, config in configs.items()}
    with attached(model, whole) as made:
        yield {name: one.caches for name, one in made.items()}


def _sparsity(model: nn.Module, share: float) -> Sparsity:
    tokens = mx.random.randint(0, 64, (_TOKENS,), key=mx.random.key(0))
    chunk = Chunk(tokens, tokens)
    found = thresholds(model, "teal", "uniform", [share], [chunk], lambda what, done: None)
    return Sparsity(found.keeps(share))


def step(
    model: nn.Module,
    caches: list[Any],
    products: AbstractContextManager[Any] | None = None,
) -> Callable[[], object]:
    """Decode one token.

    Args:
        products: who multiplies the weights; None for what was attached last.
    """
    token = mx.array([[1]])
    products = products or nullcontext()

    def run() -> None:
        with products:
            mx.eval(model(token, cache=caches))

    return run
