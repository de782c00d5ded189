"""Which cache an array came from.

`update_and_fetch` hands lazy arrays to the model. If the model passes those very objects to
attention, they need never be computed: attention reads the cache behind them. So the arrays are
remembered by identity, as weak references; every other use of them computes them and is right too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

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
