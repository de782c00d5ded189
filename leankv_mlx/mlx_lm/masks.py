"""Which key channels the caches of a model keep: its own mask, and whether the model goes with one.

A head that keeps none holds no tokens between sink tokens and window, and no array can say so: only
a model whose attention asks the cache can have a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache.masks import digest_of, find, share_of
from leankv_mlx.codec.channels import Channels
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import CalibrationError, ConfigError, UnsupportedError
from leankv_mlx.mlx_lm.loading import fingerprint, folder_of
from leankv_mlx.mlx_lm.watching import watched
from leankv_mlx.settings import Mask


def masked(
    model: nn.Module,
    config: CompressionConfig,
    caches: Sequence[Any],
    compressed: Sequence[bool],
    channels: Iterable[Channels] | None,
) -> tuple[CompressionConfig, list[Channels | None]]:
    """The settings with the digest of their mask, and what each cache of a model keeps.

    Args:
        caches: that the model makes itself; they are used up.
        compressed: which of them are replaced.
        channels: of those, in order, in place of the mask that the settings name.

    Raises:
        ConfigError: the channels are not those of the mask, or it has no name.
        CalibrationError: the model has no such mask, or it does not fit.
        UnsupportedError: the model cannot have one.
    """
    mask = config.mask
    if not mask:
        if channels is not None:
            raise ConfigError("channels are those of a mask; name it in the settings, mask=NAME.")
        return config, [None] * len(caches)
    shapes = asking_shapes(model, caches, compressed, f"mask={mask}")
    layers = _own(model, mask) if channels is None else tuple(channels)
    if shapes != [(layer.heads, layer.head_dim) for layer in layers]:
        raise CalibrationError(
            f"mask={mask} does not fit the layers of this model; "
            f"run leankv learn masks MODEL -o {mask.name} with it."
        )
    named = Mask(mask.name, digest_of(layers))
    if mask.digest not in ("", named.digest):
        raise ConfigError(f"these channels are those of mask={named}, not of mask={mask}.")
    rest = iter(layers)
    return replace(config, mask=named), [next(rest) if ours else None for ours in compressed]


def asking_shapes(
    model: nn.Module, caches: Sequence[Any], compressed: Sequence[bool], what: str
) -> list[tuple[int, int]]:
    """KV heads and head_dim of each compressed layer of a model that can have a mask.

    Args:
        caches: that the model makes itself; they are used up.
        compressed: which of them are replaced.
        what: needs it, for a message.

    Raises:
        UnsupportedError: nothing is compressed, or the model computes attention itself.
    """
    if not any(compressed):
        raise UnsupportedError(
            f"{what} does nothing with this model, of whose cache nothing is compressed; drop it."
        )
    asked = _asked(model, caches)
    shapes = [asked[i] for i, ours in enumerate(compressed) if ours and i in asked]
    if len(shapes) < sum(compressed):
        raise UnsupportedError(
            f"{what} does not go with this model, whose attention does not ask the cache; drop it."
        )
    return shapes


def kept(channels: Channels) -> str:
    """What a layer keeps, for its row of a report."""
    holders = sum(groups > 0 for groups in channels.groups)
    text = f"keeps {share_of([channels]):.0%} of its key channels"
    if holders < channels.heads:
        text += f", {holders} of {channels.heads} heads hold middle tokens"
    return text


def _own(model: nn.Module, mask: Mask) -> Sequence[Channels]:
    folder = folder_of(model)
    if folder is None:
        raise CalibrationError(
            f"mask={mask} needs the folder of the model, whose mask it is; "
            "load it with leankv_mlx.mlx_lm.load."
        )
    return find(fingerprint(folder), folder.name, mask).layers


def _asked(model: nn.Module, caches: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """Which of a model's caches its attention asks: KV heads and head_dim of their keys, by a
    forward of one token that is never computed."""
    shapes: dict[int, tuple[int, int]] = {}

    def see(index: int, queries: mx.array, keys: mx.array) -> None:
        shapes[index] = keys.shape[1], keys.shape[3]

    with watched(model, caches, see):
        model(mx.array([[1]]), cache=caches)
    return shapes
