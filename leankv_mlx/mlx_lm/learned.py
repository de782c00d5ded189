"""What was learned of the keys of a model, its mask or its basis: which one its caches have, and
whether the model goes with one.

A head of a mask that keeps nothing holds no tokens between sink tokens and window, and no array can
say so; and a basis is learned from the queries that a cache is asked. So only a model whose
attention asks the cache can have either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache import bases, masks
from leankv_mlx.cache.learned_file import Files
from leankv_mlx.codec.basis import Basis
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.space import Learned
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import CalibrationError, ConfigError, UnsupportedError
from leankv_mlx.mlx_lm.loading import fingerprint, folder_of
from leankv_mlx.mlx_lm.watching import Call, watched
from leankv_mlx.settings import Named


def resolved(
    model: nn.Module,
    config: CompressionConfig,
    caches: Sequence[Any],
    compressed: Sequence[bool],
    learned: Iterable[Learned] | None,
) -> tuple[CompressionConfig, list[Learned | None]]:
    """The settings with the digest of their mask or basis, and what each cache of a model has.

    Args:
        caches: that the model makes itself; they are used up.
        compressed: which of them are replaced.
        learned: of those, in order, in place of what the settings name.

    Raises:
        ConfigError: what was learned is not what the settings name, or they name nothing.
        CalibrationError: the model has no such mask or basis, or it does not fit.
        UnsupportedError: the model cannot have one.
    """
    if not (config.mask or config.basis):
        if learned is not None:
            raise ConfigError(
                "what was learned is that of a mask or a basis; name it in the settings, mask=NAME "
                "or basis=NAME."
            )
        return config, [None] * len(caches)
    files: Files[Any] = masks.FILES if config.mask else bases.FILES
    named: Named = getattr(config, files.setting)
    what = f"{files.setting}={named}"
    shapes = asking_shapes(model, caches, compressed, what)
    layers = _own(model, files, named) if learned is None else tuple(learned)
    if not all(isinstance(layer, Channels if config.mask else Basis) for layer in layers):
        raise ConfigError(f"what was learned is no {files.setting}, as {what} names one.")
    if shapes != [(layer.heads, layer.head_dim) for layer in layers]:
        raise CalibrationError(
            f"{what} does not fit the layers of this model; run {files.learn(named.name)} with it."
        )
    found = Named(named.name, files.digest_of(layers))
    if named.digest not in ("", found.digest):
        raise ConfigError(f"what was learned is that of {files.setting}={found}, not of {what}.")
    rest = iter(layers)
    change: dict[str, Any] = {files.setting: found}
    return replace(config, **change), [next(rest) if ours else None for ours in compressed]


def asking_shapes(
    model: nn.Module, caches: Sequence[Any], compressed: Sequence[bool], what: str
) -> list[tuple[int, int]]:
    """KV heads and head_dim of each compressed layer of a model that can have a mask or a basis.

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
    text = f"keeps {masks.share_of([channels]):.0%} of its key channels"
    if holders < channels.heads:
        text += f", {holders} of {channels.heads} heads hold middle tokens"
    return text


def _own(model: nn.Module, files: Files[Any], named: Named) -> Sequence[Learned]:
    folder = folder_of(model)
    if folder is None:
        raise CalibrationError(
            f"{files.setting}={named} needs the folder of the model, whose {files.setting} it is; "
            "load it with leankv_mlx.mlx_lm.load."
        )
    layers: Sequence[Learned] = files.find(fingerprint(folder), folder.name, named).layers
    return layers


def _asked(model: nn.Module, caches: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """Which of a model's caches its attention asks: KV heads and head_dim of their keys, by a
    forward of one token that is never computed."""
    shapes: dict[int, tuple[int, int]] = {}

    def see(index: int, call: Call) -> None:
        shapes[index] = call.keys.shape[1], call.keys.shape[3]

    with watched(model, caches, see):
        model(mx.array([[1]]), cache=caches)
    return shapes
