"""What small models lack and large ones have, put into any model: outlier channels and key biases.

- Outliers: both channels of a few RoPE pairs of K are multiplied by a factor and the same channels
  of Q by its inverse. The function is unchanged, because RoPE rotates a pair, and that commutes
  with a factor on both of its channels.
- Bias: a constant is added to a few RoPE pairs of every key before RoPE, as the key biases of some
  large models do. That changes the function, so the biased model is its own baseline.

What a model calls to make keys and queries (the projections, or the norms behind them) is wrapped,
so caches and attention run as they always do, and the weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from leankv_mlx.errors import UnsupportedError

_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")

Channels = NDArray[np.float32]


@dataclass(frozen=True)
class Stress:
    """One injection, into every attention layer.

    Attributes:
        kind: "outliers"; "bias" on any RoPE pairs; or "slow bias" on those that RoPE turns least.
        pairs: RoPE pairs in each KV head.
        strength: the factor of outliers, or the size of a bias in units of the rms of the keys.
    """

    kind: Literal["outliers", "bias", "slow bias"]
    pairs: int
    strength: float

    @property
    def name(self) -> str:
        """Such as "outliers: 2 pairs x30"."""
        return f"{self.kind}: {self.pairs} pair{'s' * (self.pairs > 1)} x{self.strength:g}"


STRESSES = (
    Stress("outliers", 1, 10.0),
    Stress("outliers", 2, 30.0),
    Stress("outliers", 4, 100.0),
    Stress("slow bias", 2, 30.0),
    Stress("bias", 1, 3.0),
    Stress("bias", 2, 10.0),
)


class _Changed(nn.Module):
    """A module whose output [.., n] is multiplied by `factor` and shifted by `bias`."""

    def __init__(self, inner: nn.Module, factor: Channels, bias: Channels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner
        self.factor, self.bias = mx.array(factor), mx.array(bias)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.inner(x)
        return y * self.factor.astype(y.dtype) + self.bias.astype(y.dtype)


class _Recorder(nn.Module):
    """Keeps the root mean square of what a module puts out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner
        self.rms = 0.0

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.inner(x)
        self.rms = float(np.array(mx.sqrt(y.astype(mx.float32).square().mean())))
        return y


@dataclass(frozen=True)
class _Layer:
    """One attention module: where its keys and queries come from, and how RoPE pairs channels."""

    module: Any
    head_dim: int

    @classmethod
    def of(cls, module: Any) -> _Layer:
        heads = next((int(getattr(module, name)) for name in _HEADS if hasattr(module, name)), 0)
        if not heads or "q_proj" not in module:
            raise UnsupportedError(
                f"{type(module).__name__} does not make its keys in a way that --stress knows."
            )
        return cls(module, module.k_proj.weight.shape[0] // heads)

    def source(self, side: str) -> str:
        """The attribute that puts out keys ("k") or queries ("q"), before RoPE."""
        return f"{side}_norm" if f"{side}_norm" in self.module else f"{side}_proj"

    def width(self, side: str) -> int:
        """Channels that the source puts out: those of all heads, or of one if they share a norm."""
        return int(self.module[self.source(side)].weight.shape[0])

    def pairs(self) -> NDArray[np.int64]:
        """See `rope_pairs`."""
        return rope_pairs(getattr(self.module, "rope", None), self.head_dim)

    def chosen(self, rng: np.random.Generator, stress: Stress) -> list[NDArray[np.int64]]:
        """The pairs to change in each head of the keys, as channels [pairs, 2]."""
        pairs = self.pairs()
        heads = self.width("k") // self.head_dim
        if stress.kind == "slow bias":
            return [pairs[-stress.pairs :]] * heads
        return [rng.permutation(pairs)[: stress.pairs] for _ in range(heads)]

    def change(self, side: str, factor: Channels, bias: Channels) -> None:
        """Wrap the source; the arrays are those of the key heads, [heads, head_dim]."""
        inner = self.module[self.source(side)]
        groups = self.width(side) // factor.size  # query heads of a KV head, side by side
        wide = (np.repeat(x, groups, axis=0).ravel() for x in (factor, bias))
        self.module[self.source(side)] = _Changed(inner, *wide)


def rope_pairs(rope: Any, head_dim: int) -> NDArray[np.int64]:
    """Channels of a head by RoPE pair, fastest first, [pairs, 2]; those that are not turned are in
    none.

    Args:
        rope: of mlx-lm or MLX; None for one of all channels, of which each half has one of a pair.
    """
    channels = np.arange(int(getattr(rope, "dims", head_dim)))
    if getattr(rope, "traditional", False):
        return channels.reshape(-1, 2)
    return channels.reshape(2, -1).T


@contextmanager
def injected(model: nn.Module, stress: Stress, tokens: mx.array) -> Iterator[None]:
    """The model has the outliers or biases inside of the block.

    Args:
        model: a model of mlx-lm with separate projections of keys and queries.
        stress: what to inject.
        tokens: some text [N], on which the size of keys is measured.

    Raises:
        UnsupportedError: its attention is built in another way.
    """
    layers = [_Layer.of(module) for module in model.modules() if "k_proj" in module]
    if not layers:
        raise UnsupportedError("this model has no k_proj, so --stress cannot change its keys.")
    originals = [
        (layer.module, name, layer.module[name])
        for layer in layers
        for name in (layer.source("k"), layer.source("q"))
    ]
    sizes = _key_sizes(model, layers, tokens)
    rng = np.random.default_rng(1)
    try:
        for layer, size in zip(layers, sizes, strict=True):
            _inject(layer, stress, size, rng)
        yield
    finally:
        for module, name, original in originals:
            module[name] = original


def _inject(layer: _Layer, stress: Stress, size: float, rng: np.random.Generator) -> None:
    heads = layer.width("k") // layer.head_dim
    factor = np.ones((heads, layer.head_dim), np.float32)
    bias = np.zeros_like(factor)
    for head, pairs in enumerate(layer.chosen(rng, stress)):
        if stress.kind == "outliers":
            factor[head, pairs] = stress.strength
        else:
            angle = 2 * np.pi * rng.random(len(pairs))
            direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
            bias[head, pairs] = stress.strength * size * direction
    layer.change("k", factor, bias)
    layer.change("q", np.reciprocal(factor), np.zeros_like(bias))


def _key_sizes(model: nn.Module, layers: list[_Layer], tokens: mx.array) -> list[float]:
    """The rms of each layer's keys."""
    for layer in layers:
        name = layer.source("k")
        layer.module[name] = _Recorder(layer.module[name])
    try:
        model(tokens[None])
        return [layer.module[layer.source("k")].rms for layer in layers]
    finally:
        for layer in layers:
            layer.module[layer.source("k")] = layer.module[layer.source("k")].inner
