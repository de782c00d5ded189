"""What the caches of a model will take in memory, before there is a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from leankv_mlx.cache import entries
from leankv_mlx.cache.memory import CacheMemory, planned
from leankv_mlx.codec.format import TILE
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm.attachment import Attachment, own_caches
from leankv_mlx.mlx_lm.machine import memory_size
from leankv_mlx.mlx_lm.precision import weights_dtype
from leankv_mlx.projections import Relaid

_SIDE_BYTES = 5
"""Position and score of a slot, where heads may lose tokens: 3 bytes up to 65,536 tokens."""
_SPARE = 0.75
"""Share of the machine's memory that model and cache may take, if no budget is given."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One cache with keys and values of `bound` tokens at most (0: of all); `config` is that of its
    compression (None: it has none), `exact_bytes` an element of its exact rows then,
    `element_bytes` one of the model's own cache."""

    heads: int
    k_dim: int
    v_dim: int
    element_bytes: int
    exact_bytes: int
    bound: int
    config: CompressionConfig | None

    def memory(self, tokens: int) -> CacheMemory:
        """Of a layer that is compressed."""
        assert self.config is not None
        return planned(self.config, tokens, self.heads, self.k_dim, self.v_dim, self.exact_bytes)

    def side(self, tokens: int) -> int:
        """Bytes beside the codes, where a policy drops tokens, or a mask has heads stored apart and
        a trim may cut them."""
        assert self.config is not None
        return _SIDE_BYTES * self.heads * tokens if self.config.settles else 0

    def used(self, tokens: int) -> int:
        return self.memory(tokens).used if self.config else self.uncompressed(tokens)

    def uncompressed(self, tokens: int) -> int:
        held = min(tokens, self.bound) if self.bound else tokens
        return held * self.heads * (self.k_dim + self.v_dim) * self.element_bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in use by a model's caches as a function of their length, as `measure` counts them.

    That is what reading a prompt takes, before anything of it goes. Exact after a prompt is read;
    after single tokens up to 32 of them are still exact rows that are counted as codes here.
    Buffers grow by an eighth at a time, so they hold up to that much more.
    """

    layers: tuple[_Layer, ...]

    @classmethod
    def of(cls, model: nn.Module, attachment: Attachment | None) -> Footprint:
        """Find the shapes by a forward of one token that is never computed.

        Args:
            attachment: what the caches will be, None for the model's own.
        """
        caches = own_caches(model)
        model(mx.array([[1]]), cache=caches)
        exact = weights_dtype(model)
        none = [None] * len(caches)
        configs = attachment.layer_configs if attachment else none
        layers = [
            layer
            for cache, config in zip(caches, configs, strict=True)
            for layer in _layers(cache, config, exact)
        ]
        return cls(tuple(layers))

    def used(self, tokens: int) -> int:
        """Bytes that `tokens` tokens take."""
        return sum(layer.used(tokens) for layer in self.layers)

    def most(self, tokens: int) -> int:
        """Bytes that up to `tokens` tokens take at most, in whatever steps they come; without the
        queries that a policy which drops tokens looks at while a prompt is read."""
        total = 0
        for layer in self.layers:
            total += layer.used(tokens)
            if layer.config is not None:
                total += min(tokens, TILE) * layer.memory(1).exact
                total += layer.side(tokens)
        return total

    def shared(self, tokens: int) -> int:
        """Bytes of `tokens` tokens that a copy never has for itself, however it goes on: none
        where something of a prompt goes once it is in, as what stays is then the copy's own."""
        configs = ((layer, layer.config) for layer in self.layers)
        found = [layer.memory(tokens) for layer, own in configs if own and not own.settles]
        return sum(memory.codes + memory.scales for memory in found)

    def uncompressed(self, tokens: int) -> int:
        """Bytes that they take in the model's own caches."""
        return sum(layer.uncompressed(tokens) for layer in self.layers)

    def longest(self, budget: int, most: int) -> int:
        """Tokens that fit `budget` bytes, at most `most`."""
        if self.used(most) <= budget:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.used(middle) <= budget else (low, middle)
        return low


def _layers(
    cache: Any, config: CompressionConfig | None, exact: mx.Dtype | None
) -> Iterator[_Layer]:
    for entry in entries([cache]):
        keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array):
            bound = getattr(entry, "max_size", None) or getattr(entry, "chunk_size", None) or 0
            yield _Layer(
                keys.shape[1],
                keys.shape[3],
                values.shape[3],
                keys.dtype.size,
                (exact or keys.dtype).size,
                bound,
                config,
            )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, as they are held."""
    parameters: Any = tree_flatten(model.parameters())
    total = sum(array.nbytes for _, array in parameters)
    for layer in model.modules():
        if isinstance(layer, Relaid) and (held := layer.held.weight) is not None:
            total += held.nbytes - sum(x.nbytes for x in layer.shown().values())
    return int(total)


def spare_memory(model: nn.Module) -> int:
    """Bytes that a KV cache may take beside the model if nobody says how many."""
    return max(0, int(memory_size() * _SPARE) - weight_bytes(model))
