"""Learned masks of key channels (LeanK, arXiv 2508.02215) of a whole model, and their files.

A file is named as `mask=NAME` names it, see `learned_file`: what a head of one model can do without
means nothing for another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.cache import container
from leankv_mlx.cache.learned_file import Content, Files, Origin, Tensors, require
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.format import TILE
from leankv_mlx.errors import ConfigError
from leankv_mlx.resources import masks as shipped
from leankv_mlx.settings import Named

KIND = container.Kind("leankv-mask", 1, (), "mask")


@dataclass(frozen=True, eq=False)
class Masks:
    """Which key channels the layers of one model keep.

    Attributes:
        layers: of each compressed layer, in order; all have the same number of KV heads and the
            same head_dim.
        alphas: what each channel is worth, 0 to 1, in the model's order of channels, float32
            [layers, H, head_dim].
        ratio: share of all groups of channels that was to be left out, 0 to 1.
        model: what tells it from others, see `mlx_lm.loading.fingerprint`.
        name: what to call the model.
        notes: how the mask came to be, by name.

    Raises:
        ConfigError: the parts do not fit each other, or a number is out of range.
    """

    layers: tuple[Channels, ...]
    alphas: NDArray[np.float32]
    ratio: float
    model: str = ""
    name: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {(layer.heads, layer.head_dim) for layer in self.layers}
        if len(shapes) != 1 or self.alphas.shape != (len(self.layers), *shapes.pop()):
            raise ConfigError("the layers of a mask have one number for each channel of each head.")
        if self.alphas.dtype != np.float32 or not ((self.alphas >= 0) & (self.alphas <= 1)).all():
            raise ConfigError("the channels of a mask are worth float32 numbers from 0 to 1.")
        _check_ratio(self.ratio)

    @classmethod
    def of(
        cls,
        alphas: NDArray[np.float32],
        ratio: float,
        model: str = "",
        name: str = "",
        notes: Mapping[str, str] | None = None,
    ) -> Masks:
        """The mask that keeps the best groups of the whole model, round((1 - ratio) * groups) of
        them. The channels of a head are sorted by what they are worth, 32 of them are a group (the
        last one of a head_dim that is no multiple has fewer), and a group is worth the mean of its
        channels. Of equals the first is kept, so the same numbers give the same mask.

        Args:
            alphas: float32 [layers, H, head_dim], each 0 to 1.
            ratio: share of the groups that is left out.

        Raises:
            ConfigError: a number is out of range, or there are none.
        """
        if alphas.ndim != 3 or not alphas.size:
            raise ConfigError("a mask needs the worth of each channel, [layers, H, head_dim].")
        _check_ratio(ratio)
        order = np.argsort(-alphas, axis=-1, kind="stable")
        # So few float32 numbers add up in float64 without putting a later group first.
        ranked = np.take_along_axis(alphas, order, axis=-1).astype(np.float64)
        starts = np.arange(0, alphas.shape[-1], TILE)
        sizes = np.diff(np.append(starts, alphas.shape[-1]))
        worth = np.add.reduceat(ranked, starts, axis=-1) / sizes
        best = np.argsort(-worth, axis=None, kind="stable")[: round((1 - ratio) * worth.size)]
        kept = np.zeros(worth.size, np.int64)
        kept[best] = 1
        groups = kept.reshape(worth.shape).sum(axis=-1)
        layers = tuple(map(Channels.of, order, groups))
        return cls(layers, alphas, ratio, model, name, dict(notes or {}))

    @cached_property
    def digest(self) -> str:
        """See `digest_of`."""
        return digest_of(self.layers)

    @property
    def order(self) -> NDArray[np.int32]:
        """The channels of each head, those that it keeps first, [layers, H, head_dim]."""
        return np.array([layer.order for layer in self.layers], np.int32)

    @property
    def groups(self) -> NDArray[np.int32]:
        """How many groups of 32 channels each head keeps, [layers, H]."""
        return np.array([layer.groups for layer in self.layers], np.int32)

    @property
    def channels(self) -> NDArray[np.int64]:
        """How many channels each head keeps, [layers, H]."""
        return np.minimum(TILE * self.groups.astype(np.int64), self.alphas.shape[-1])

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether codes keep a channel, in the model's order, [layers, H, head_dim]."""
        order, stored = self.order, self.channels[..., None]
        found = np.zeros(order.shape, bool)
        np.put_along_axis(found, order, np.arange(order.shape[-1]) < stored, axis=-1)
        return found


def digest_of(layers: Iterable[Channels]) -> str:
    """What tells a mask from others, 8 hex digits: of the channels that its layers keep, and of
    their order, which is that of stored keys."""
    content = json.dumps([(layer.order, layer.groups) for layer in layers])
    return hashlib.blake2b(content.encode(), digest_size=4).hexdigest()


def share_of(layers: Iterable[Channels]) -> float:
    """Of the key channels, that layers keep."""
    kept = total = 0
    for layer in layers:
        kept += sum(min(TILE * groups, layer.head_dim) for groups in layer.groups)
        total += layer.heads * layer.head_dim
    return kept / total


def save(masks: Masks, name: str) -> Path:
    """See `learned_file.Files.save`."""
    return FILES.save(masks, name)


def load(name: str) -> Masks:
    """See `learned_file.Files.load`."""
    return FILES.load(name)


def find(model: str, called: str, mask: Named) -> Masks:
    """See `learned_file.Files.find`."""
    return FILES.find(model, called, mask)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ConfigError(f"a mask leaves out a share from 0 to 1 of its channels, not {ratio:g}.")


def _written(masks: Masks) -> Content:
    tensors = {
        "order": mx.array(masks.order),
        "groups": mx.array(masks.groups),
        "alphas": mx.array(masks.alphas),
    }
    return tensors, {"ratio": repr(float(masks.ratio))}


def _read(tensors: Tensors, texts: dict[str, str], origin: Origin) -> Masks:
    order, groups, alphas = (np.array(tensors.pop(name)) for name in ("order", "groups", "alphas"))
    require(order.ndim == 3 and order.size > 0)
    require(order.dtype == groups.dtype == np.int32 and groups.shape == order.shape[:2])
    layers = tuple(map(Channels.of, order, groups))
    return Masks(layers, alphas, float(texts["ratio"]), *origin)


FILES = Files(KIND, "masks", "masks", lambda: shipped(), digest_of, _written, _read)
