"""Which cache an array came from.

`update_and_fetch` hands lazy arrays to the model. If the model passes those very objects to
attention, they need never be computed: attention reads the cache behind them. So the arrays are
remembered by identity, as weak references; every other use of them computes them and is right too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import mlx.core as mx

from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.kernels import Mask

AttendFn = Callable[[mx.array, float, Mask, "mx.array | None"], mx.array]

_FETCHED: dict[int, Fetched] = {}


@dataclass(frozen=True)
class Fetched:
    """The arrays of one fetch and the attention that stands for them."""

    keys: weakref.ref[mx.array]
    values: weakref.ref[mx.array]
    attend_: AttendFn

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """queries: [1, Hq, L, head_dim], the last L tokens -> [1, Hq, L, v_head_dim]."""
        return self.attend_(queries, scale, mask, sink_logits)


def track(keys: mx.array, values: mx.array, attend: AttendFn) -> None:
    """Remember a fetch until `keys` dies."""
    name = id(keys)

    def forget(_: weakref.ref[mx.array]) -> None:
        _FETCHED.pop(name, None)

    _FETCHED[name] = Fetched(weakref.ref(keys, forget), weakref.ref(values), attend)


def owner_of(keys: mx.array, values: mx.array) -> Fetched | None:
    """The fetch that both arrays came from, by identity; None for any other array."""
    fetched = _FETCHED.get(id(keys))
    if fetched is None or fetched.keys() is not keys or fetched.values() is not values:
        return None
    return fetched


def _refuse(*_: object, **__: object) -> NoReturn:
    raise DroppedTokensError("reads keys and values itself")


class Withheld:
    """Stands for keys or values whose heads have lost tokens.

    As an array they would have gaps that only the attention behind `owner_of` knows of. So there
    is none: whoever uses this as one gets a DroppedTokensError, or a TypeError from functions of
    MLX that take nothing but its own arrays.

    Attributes:
        shape: [1, H, N, head_dim]; N of the head that kept most.
        dtype: of the model's keys and values.
        ndim: 4.
    """

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks what an object can do
            raise AttributeError(name)
        _refuse()

    __array__ = __mlx_array__ = __getitem__ = __setitem__ = __iter__ = __len__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __pow__ = __neg__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __rpow__ = _refuse
