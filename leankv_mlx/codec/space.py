"""From a layer's keys, values and queries to the space that they are stored in, and back.

Keys are scaled channel by channel (`equalize`), or multiplied by a matrix that was learned
(`basis`), then keys and values are rotated (`rotation`); with a mask the channels of the keys are
put in order first, the kept ones in front (`channels`). Queries are scaled by the inverse and
rotated alike, so scores keep their value; the output of attention is un-rotated once. Sink tokens,
codes and window all lie in this one space, so one rotated query serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.codec.basis import Basis
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.rotation import Rotation, ordered, rotation
from leankv_mlx.config import RotationName

Learned = Channels | Basis
"""What was learned of the keys of a layer: one or the other, or nothing."""


@dataclass(frozen=True)
class Space:
    """Of one layer.

    Attributes:
        rotations: of the keys (and queries), and of the values (and outputs).
        equalizer: of the keys; None while it is not fitted, or not wanted.
        channels: which of the keys are kept, and their order, which is a part of their rotation;
            None for all as they are.
        basis: of the keys, in place of the equalizer; None for that of the model.
    """

    rotations: tuple[Rotation, Rotation]
    equalizer: Equalizer | None = None
    channels: Channels | None = None
    basis: Basis | None = None

    @classmethod
    def of(cls, name: RotationName, k_dim: int, v_dim: int, learned: Learned | None) -> Space:
        """That of a layer with this rotation. Groups that are kept and groups that are not must not
        be mixed, so keys are rotated group by group if some are not."""
        channels = learned if isinstance(learned, Channels) else None
        basis = learned if isinstance(learned, Basis) else None
        of_keys = ordered(name, channels) if channels else rotation(name, k_dim)
        return cls((of_keys, rotation(name, v_dim)), None, channels, basis)

    @property
    def learned(self) -> Learned | None:
        """What `of` was given."""
        return self.channels or self.basis

    @property
    def arrays(self) -> list[mx.array]:
        """What it holds of its own. The matrices of a basis are a constant of the model, like its
        weights: they are there once, however many caches it has."""
        return [self.equalizer.scales] if self.equalizer else []

    @property
    def shaping(self) -> mx.array | None:
        """What errors of stored keys cost, see `codec.shaping`; None if nothing is known of it."""
        return self.basis.shaping(self.rotations[0]) if self.basis else None

    @property
    def scales(self) -> mx.array | None:
        """What an equalizer divides keys by and multiplies queries by, float32 [H, head_dim]; None
        without one."""
        return self.equalizer.scales if self.equalizer else None

    def scaled(self, keys: mx.array) -> mx.array:
        """keys: [.., H, T, head_dim] -> what is to be rotated; in float32 if that differs, so that
        rows of 16 bits are rounded once."""
        return self._change.apply(keys.astype(mx.float32)) if self._change else keys

    def queries(self, queries: mx.array) -> mx.array:
        """queries: [1, Hq, L, head_dim], or of several sequences with a basis -> what is to be
        rotated, the dtype kept."""
        return self._change.queries(queries) if self._change else queries

    def rotated(self, queries: mx.array) -> mx.array:
        """queries: [1, Hq, L, head_dim] -> what meets stored keys, [1, Hq, L, Dk]."""
        return self.rotations[0].apply(self.queries(queries))

    def undone(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Stored rows [H, T, Dk] and [H, T, Dv] -> keys and values as the model made them."""
        return self.unscaled(self.rotations[0].undo(k)), self.rotations[1].undo(v)

    def unscaled(self, keys: mx.array) -> mx.array:
        """The keys that `scaled` was given, but for rounding."""
        return self._change.undo(keys) if self._change else keys

    @property
    def _change(self) -> Basis | Equalizer | None:
        return self.basis or self.equalizer
