"""Rotations that spread the energy of a vector evenly over its channels.

A rotation R is orthonormal, so scores keep their value when queries and keys are both rotated:
(Rq).(Rk) = q.k. Values are rotated too and the attention output is un-rotated once. The random
signs matter: without them a constant vector lands on a single coefficient (QuaRot,
arXiv 2404.00456; TurboQuant, arXiv 2504.19874).
"""

import hashlib
from functools import cached_property, lru_cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from leankv_mlx.codec.channels import Channels, reordered
from leankv_mlx.codec.format import TILE, padded
from leankv_mlx.config import RotationName


class Rotation(Protocol):
    """An orthonormal map of head vectors, from head_dim to a multiple of 32 channels."""

    head_dim: int
    dim: int

    def apply(self, x: mx.array) -> mx.array:
        """x: [..., n * H, T, head_dim] -> [..., dim], the dtype kept; computed in fp32."""

    def undo(self, x: mx.array) -> mx.array:
        """x: [..., n * H, T, dim] -> [..., head_dim], the dtype kept; computed in fp32."""


class Hadamard:
    """Fixed random signs, then an orthonormal Walsh-Hadamard transform of each block.

    Args:
        head_dim: padded with zero channels to `dim`, a multiple of 32.
        block: channels of a block, a power of two from 32 that divides `dim`; 0 for the largest.
    """

    def __init__(self, head_dim: int, block: int = 0) -> None:
        self.head_dim = head_dim
        self.dim = padded(head_dim)
        self.block = block or self.dim & -self.dim

    @cached_property
    def signs(self) -> mx.array:
        """+-1 of each channel, float32 [dim]."""
        return mx.array(signs(self.dim))

    def apply(self, x: mx.array) -> mx.array:
        """See `Rotation`."""
        y = x.astype(mx.float32)
        if self.dim != self.head_dim:
            y = mx.pad(y, [(0, 0)] * (x.ndim - 1) + [(0, self.dim - self.head_dim)])
        return self._transform(y * self.signs).astype(x.dtype)

    def undo(self, x: mx.array) -> mx.array:
        """See `Rotation`."""
        y = self._transform(x.astype(mx.float32)) * self.signs
        return y[..., : self.head_dim].astype(x.dtype)

    def _transform(self, x: mx.array) -> mx.array:
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        return mx.hadamard_transform(blocks, scale=self.block**-0.5).reshape(x.shape)


class Ordered:
    """The channels of each KV head in another order, then a rotation of groups of 32 channels, so
    that those which codes keep and those which they do not stay apart. Of keys and queries."""

    def __init__(self, rotation: Rotation, channels: Channels) -> None:
        self.rotation = rotation
        self.channels = channels
        self.head_dim, self.dim = rotation.head_dim, rotation.dim

    def apply(self, x: mx.array) -> mx.array:
        """See `Rotation`."""
        return self.rotation.apply(reordered(x, self.channels.forth))

    def undo(self, x: mx.array) -> mx.array:
        """See `Rotation`."""
        return reordered(self.rotation.undo(x), self.channels.back)


class Identity:
    """No rotation: what an ablation compares with. Only the padding to 32 channels is left."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.dim = padded(head_dim)

    def apply(self, x: mx.array) -> mx.array:
        """See `Rotation`."""
        return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.dim - self.head_dim)])

    def undo(self, x: mx.array) -> mx.array:
        """See `Rotation`."""
        return x[..., : self.head_dim]


def signs(dim: int) -> np.ndarray:
    """The fixed +-1 of each channel, float32 [dim]: they are part of every stored cache."""
    bits = np.frombuffer(hashlib.shake_256(b"leankv rotation").digest(dim // 8), np.uint8)
    return np.where(np.unpackbits(bits), np.float32(-1), np.float32(1))


@lru_cache(maxsize=64)
def rotation(name: RotationName, head_dim: int, block: int = 0) -> Rotation:
    """The rotation of a config's name; all layers share one. `block` as in `Hadamard`."""
    return hadamard(head_dim, block) if name == "hadamard" else Identity(head_dim)


@lru_cache(maxsize=1024)
def ordered(name: RotationName, channels: Channels) -> Ordered:
    """The rotation of keys of which codes keep some channels; copies of a layer share it."""
    return Ordered(rotation(name, channels.head_dim, TILE), channels)


@lru_cache(maxsize=64)
def hadamard(head_dim: int, block: int = 0) -> Hadamard:
    """The Hadamard rotation of a head_dim, see there."""
    return Hadamard(head_dim, block)
