"""A matrix for the keys of each KV head, undone in the queries.

Multiplying all keys by a matrix T and all queries by its transposed inverse changes no score:
(T^-T q).(T k) = q.k. The rotation behind it spreads the error of a stored vector over all
directions alike, so what an error costs is the size of the keys times that of the queries, both
summed over the directions. It is least in a basis in which both have the same diagonal covariance:
an equalizer (`codec.equalize`) that also turns. How the matrix is learned is `learning.basis`.
"""

from __future__ import annotations

import hashlib
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.errors import ConfigError

LARGEST = 1e5
"""Condition number, by the largest sums of columns: beyond it too little is left of float32."""


class Basis:
    """Of the keys of one layer; equal to any other of the same content.

    Args:
        matrix: T of each KV head, [H, head_dim, head_dim], of numbers that float16 has, because
            that is how it is held and stored; keys are columns to it.

    Attributes:
        matrix: float16 [H, head_dim, head_dim].
        inverse: of it, float32 [H, head_dim, head_dim], computed in float64.

    Raises:
        ConfigError: it has another shape or other numbers, or cannot be inverted.
    """

    def __init__(self, matrix: NDArray[np.floating]) -> None:
        if matrix.ndim != 3 or not matrix.size or matrix.shape[1] != matrix.shape[2]:
            raise ConfigError("a basis has one square matrix for each KV head.")
        with np.errstate(over="ignore"):
            held = matrix.astype(np.float16)
        if not np.isfinite(held).all() or (held != matrix).any():
            raise ConfigError("a basis has numbers of float16.")
        inverse = _inverted(held)
        if inverse is None:
            raise ConfigError("a basis has matrices that can be inverted.")
        self.matrix = mx.array(held)
        self.inverse = mx.array(inverse.astype(np.float32))
        self._content = _content(held)

    @classmethod
    def shared(cls, matrix: NDArray[np.float16]) -> Basis:
        """That of a matrix; the same object as long as one that came of it lives: caches that are
        read from files then hold what those of the attached model hold.

        Raises:
            ConfigError: see `Basis`.
        """
        known = _LIVING.get(_content(matrix))
        return _LIVING.setdefault(_content(matrix), cls(matrix)) if known is None else known

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


_Content = tuple[tuple[int, ...], bytes]
_LIVING: WeakValueDictionary[_Content, Basis] = WeakValueDictionary()


def _content(matrix: NDArray[np.float16]) -> _Content:
    """What tells it from others: its shape, and a digest of its numbers."""
    return matrix.shape, hashlib.blake2b(matrix.tobytes(), digest_size=16).digest()


def _inverted(matrix: NDArray[np.floating]) -> NDArray[np.float64] | None:
    """The inverses of matrices [.., n, n]; None if one of them has none to speak of."""
    wide = matrix.astype(np.float64)
    try:
        inverse = np.linalg.inv(wide).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    sizes = [np.abs(x).sum(axis=-2).max(axis=-1) for x in (wide, inverse)]
    return inverse if (sizes[0] * sizes[1] <= LARGEST).all() else None
