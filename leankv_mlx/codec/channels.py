"""Which key channels of each KV head codes keep (LeanK, arXiv 2508.02215).

A mask is static: learned once for a model, the same for every token. A prompt is read with all
channels; once it is in, sink tokens and window keep all, and codes only what the mask keeps, in
groups of 32 (`codec.format`). So that what a head keeps are its first groups, its channels are put
in another order, the kept ones first, and groups are rotated apart: then one rotated query serves
exact rows, which hold all groups, and codes, which hold the first ones, and codes that give up
groups need not be made anew. A head that keeps none then holds no token between sink tokens and
window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.format import TILE, padded
from leankv_mlx.errors import ConfigError


@dataclass(frozen=True)
class Channels:
    """Of the keys of one layer.

    Attributes:
        order: all channels of each KV head, those that it keeps first: [H] of [head_dim].
        groups: how many groups of 32 of them each head keeps, [H].

    Raises:
        ConfigError: a head has a channel twice, or keeps more than it has.
    """

    order: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        heads = len(self.order)
        dims = {len(head) for head in self.order}
        if len(dims) != 1 or len(self.groups) != heads:
            raise ConfigError("a mask of channels has one row and one number for each KV head.")
        if any(sorted(head) != list(range(self.head_dim)) for head in self.order):
            raise ConfigError("a mask of channels names each channel of a head once.")
        if not all(0 <= kept <= padded(self.head_dim) // TILE for kept in self.groups):
            raise ConfigError("a mask of channels keeps more groups than a head has.")

    @classmethod
    def of(cls, order: NDArray[np.integer], groups: NDArray[np.integer]) -> Channels:
        """From arrays: order [H, head_dim], groups [H]."""
        return cls(tuple(map(tuple, order.tolist())), tuple(groups.tolist()))

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.order)

    @property
    def head_dim(self) -> int:
        """Channels of a head, kept or not."""
        return len(self.order[0])

    @cached_property
    def forth(self) -> mx.array:
        """Where each channel of the new order comes from, int32 [H, head_dim]."""
        return mx.array(np.array(self.order, np.int32))

    @cached_property
    def back(self) -> mx.array:
        """Where each channel of the model's order comes from, int32 [H, head_dim]."""
        return mx.array(np.argsort(np.array(self.order), axis=1).astype(np.int32))

    def holders(self) -> list[tuple[int, NDArray[np.intp]]]:
        """The heads that keep anything, by how many groups they keep, the most first:
        (groups, KV heads)."""
        groups = np.array(self.groups)
        kept = sorted(set(self.groups) - {0}, reverse=True)
        return [(n, np.flatnonzero(groups == n)) for n in kept]


def reordered(x: mx.array, index: mx.array) -> mx.array:
    """Channels of each KV head in another order.

    Args:
        x: [.., n * H, L, head_dim], the n query heads of a KV head side by side.
        index: int32 [H, head_dim], see `Channels.forth`.
    """
    heads, dim = index.shape
    grouped = x.reshape(*x.shape[:-3], heads, -1, dim)
    index = mx.broadcast_to(index[:, None], grouped.shape)
    return mx.take_along_axis(grouped, index, axis=-1).reshape(x.shape)
