"""Learned bases for the keys of a whole model (`codec.basis`), and their files.

A file is named as `basis=NAME` names it, see `learned_file`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from leankv_mlx.cache import container
from leankv_mlx.cache.learned_file import Content, Files, Origin, Tensors, require
from leankv_mlx.codec.basis import Basis
from leankv_mlx.errors import ConfigError
from leankv_mlx.resources import bases as shipped

KIND = container.Kind("leankv-basis", 1, (), "basis")


@dataclass(frozen=True, eq=False)
class Bases:
    """The bases of the layers of one model.

    Attributes:
        layers: of each compressed layer, in order; all have the same number of KV heads and the
            same head_dim.
        model: what tells it from others, see `mlx_lm.loading.fingerprint`.
        name: what to call the model.
        notes: how they came to be, by name.

    Raises:
        ConfigError: there are none, or the layers are of several shapes.
    """

    layers: tuple[Basis, ...]
    model: str = ""
    name: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({(layer.heads, layer.head_dim) for layer in self.layers}) != 1:
            raise ConfigError("the layers of a basis have as many heads of the same size.")

    @cached_property
    def digest(self) -> str:
        """See `digest_of`."""
        return digest_of(self.layers)


def digest_of(layers: Iterable[Basis]) -> str:
    """What tells bases from others, 8 hex digits: of the numbers that stored keys depend on."""
    digest = hashlib.blake2b(digest_size=4)
    for layer in layers:
        for stored in map(np.array, (layer.matrix, layer.costs)):
            digest.update(repr(stored.shape).encode() + stored.astype("<f2").tobytes())
    return digest.hexdigest()


def _written(bases: Bases) -> Content:
    matrices = mx.stack([layer.matrix for layer in bases.layers])
    return {"matrices": matrices, "costs": mx.stack([layer.costs for layer in bases.layers])}, {}


def _read(tensors: Tensors, _: dict[str, str], origin: Origin) -> Bases:
    matrices, costs = (np.array(tensors.pop(name)) for name in ("matrices", "costs"))
    require(matrices.ndim == 4 and costs.shape == matrices.shape[:3])
    require(matrices.dtype == costs.dtype == np.float16)
    return Bases(tuple(map(Basis.shared, matrices, costs)), *origin)


FILES = Files(KIND, "bases", "rotations", lambda: shipped(), digest_of, _written, _read)
