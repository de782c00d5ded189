"""A matrix for the keys of each KV head, undone in the queries, and what errors cost there.

Multiplying all keys by a matrix T and all queries by its transposed inverse changes no score:
(T^-T q).(T k) = q.k. The rotation behind it spreads the error of a stored vector over all
directions alike, so what an error costs is the size of the keys times that of the queries, both
summed over the directions. It is least in a basis in which both have the same diagonal covariance:
an equalizer (`codec.equalize`) that also turns. What is then left of the size of the queries in
each direction is what an error costs there, and the encoder moves errors to where they are cheap
(`codec.shaping`). How both are learned is `learning.basis`.
"""

from __future__ import annotations

import hashlib
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.rotation import Rotation
from leankv_mlx.codec.shaping import shaping
from leankv_mlx.errors import ConfigError

LARGEST = 1e5
"""Condition number, by the largest sums of columns: beyond it too little is left of float32."""


class Basis:
    """Of the keys of one layer; equal to any other of the same content.

    Args:
        matrix: T of each KV head, [H, head_dim, head_dim], of numbers that float16 has, because
            that is how it is held and stored; keys are columns to it.
        costs: the mean square of the queries in each direction of the basis, up to a factor for
            each KV head, [H, head_dim], of numbers that float16 has.

    Attributes:
        matrix: float16 [H, head_dim, head_dim].
        costs: float16 [H, head_dim].
        inverse: of the matrix, float32 [H, head_dim, head_dim], computed in float64.

    Raises:
        ConfigError: they have another shape or other numbers, or cannot be inverted.
    """

    def __init__(self, matrix: NDArray[np.floating], costs: NDArray[np.floating]) -> None:
        if matrix.ndim != 3 or not matrix.size or matrix.shape[1] != matrix.shape[2]:
            raise ConfigError("a basis has one square matrix for each KV head.")
        if costs.shape != matrix.shape[:2]:
            raise ConfigError("a basis has a cost for each channel of each KV head.")
        held, weights = map(_halves, (matrix, costs))
        if (weights < 0).any() or not (weights > 0).any(axis=1).all():
            raise ConfigError("the costs of a basis are not below 0, and not all 0.")
        inverse = _inverted(held)
        if inverse is None:
            raise ConfigError("a basis has matrices that can be inverted.")
        self.matrix, self.costs = mx.array(held), mx.array(weights)
        self.inverse = mx.array(inverse.astype(np.float32))
        self._content = _content(held, weights)
        self._shapings: dict[Rotation, mx.array] = {}

    @classmethod
    def shared(cls, matrix: NDArray[np.float16], costs: NDArray[np.float16]) -> Basis:
        """That of a matrix and its costs; the same object as long as one that came of them lives:
        caches that are read from files then hold what those of the attached model hold.

        Raises:
            ConfigError: see `Basis`.
        """
        content = _content(matrix, costs)
        known = _LIVING.get(content)
        return _LIVING.setdefault(content, cls(matrix, costs)) if known is None else known

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.matrix.shape[0]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.matrix.shape[1]

    def apply(self, keys: mx.array) -> mx.array:
        """keys: [.., H, T, head_dim] -> T k, the dtype kept; computed in float32."""
        turned = keys.astype(mx.float32) @ self.matrix.astype(mx.float32).swapaxes(1, 2)
        return turned.astype(keys.dtype)

    def undo(self, keys: mx.array) -> mx.array:
        """The keys that `apply` was given, but for rounding."""
        return (keys.astype(mx.float32) @ self.inverse.swapaxes(1, 2)).astype(keys.dtype)

    def queries(self, queries: mx.array) -> mx.array:
        """queries: [B, Hq, L, head_dim], those of a KV head side by side -> what meets keys from
        `apply`, the dtype kept; computed in float32."""
        grouped = queries.reshape(queries.shape[0], self.heads, -1, self.head_dim)
        turned = grouped.astype(mx.float32) @ self.inverse
        return turned.astype(queries.dtype).reshape(queries.shape)

    def shaping(self, rotation: Rotation) -> mx.array:
        """What an encoder of keys that are in the basis and rotated needs to know of the costs, see
        `codec.shaping`; made once."""
        if rotation not in self._shapings:
            rotated = np.array(rotation.apply(mx.eye(self.head_dim)), np.float64)
            costs = np.array(self.costs, np.float64)
            self._shapings[rotation] = shaping(rotated.T @ (costs[:, :, None] * rotated))
        return self._shapings[rotation]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


_Content = tuple[tuple[int, ...], bytes]
_LIVING: WeakValueDictionary[_Content, Basis] = WeakValueDictionary()


def _content(matrix: NDArray[np.float16], costs: NDArray[np.float16]) -> _Content:
    """What tells it from others: its shape, and a digest of its numbers."""
    digest = hashlib.blake2b(matrix.tobytes(), digest_size=16)
    digest.update(costs.tobytes())
    return matrix.shape, digest.digest()


def _halves(numbers: NDArray[np.floating]) -> NDArray[np.float16]:
    """The same numbers in float16.

    Raises:
        ConfigError: it does not have them.
    """
    with np.errstate(over="ignore"):
        held = numbers.astype(np.float16)
    if not np.isfinite(held).all() or (held != numbers).any():
        raise ConfigError("a basis has numbers of float16.")
    return held


def _inverted(matrix: NDArray[np.floating]) -> NDArray[np.float64] | None:
    """The inverses of matrices [.., n, n]; None if one of them has none to speak of."""
    wide = matrix.astype(np.float64)
    try:
        inverse = np.linalg.inv(wide).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    sizes = [np.abs(x).sum(axis=-2).max(axis=-1) for x in (wide, inverse)]
    return inverse if (sizes[0] * sizes[1] <= LARGEST).all() else None
