"""The exact rows of a layer, sink tokens and window: what copies have in common is held once."""

from __future__ import annotations

import weakref
from functools import lru_cache
from threading import get_ident

import mlx.core as mx

from leankv_mlx.cache.tier import Encoded
from leankv_mlx.codec.format import TILE
from leankv_mlx.kernels import Rows


class _Common:
    """Rows that several layers begin with, and the blocks that some of them have become: by the
    first that left and how many did, while a copy holds them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.stored: weakref.WeakValueDictionary[tuple[int, int], Encoded]
        self.stored = weakref.WeakValueDictionary()
        self.users: weakref.WeakSet[ExactRows] = weakref.WeakSet()


class ExactRows:
    """Rows [H, E, D]: the sink tokens first, then the window.

    A copy of a layer goes on from the same rows. A window of 64 tokens in 16 bits takes as much as
    250 tokens of 4-bit codes, so among many short replies to one document it is what counts. What
    was there when the copy was made stays in one array for all, of which each leaves out what has
    left its window since, and what came then is each one's own. Common rows are encoded once, by
    the first copy whose window they leave.

    Args:
        rows: all of them.
        sinks: how many of the first never leave.
    """

    def __init__(self, rows: Rows, sinks: int) -> None:
        self._sinks = sinks
        self._own = rows  # all, or those behind what is common
        self._common: _Common | None = None
        self._start = self._stop = 0  # of the common rows behind the sink tokens those in use
        # What `rows` put together last, and in which thread: what is lazy belongs to one.
        self._made: tuple[int, weakref.ref[mx.array], weakref.ref[mx.array]] | None = None
        self.stored: list[Encoded] = []  # what common rows have become, for other copies

    @property
    def count(self) -> int:
        """E."""
        own = _count(self._own)
        return own if self._common is None else self._sinks + self._stop - self._start + own

    @property
    def common(self) -> bool:
        """Whether it has some in common with copies."""
        return self._common is not None

    @property
    def arrays(self) -> list[mx.array]:
        """What holds them; those that are common are the same objects for all copies."""
        return [*self._own] if self._common is None else [*self._common.rows, *self._own]

    def rows(self) -> Rows:
        """All of them. Where some are common they are put together anew, and live as long as
        somebody holds them."""
        if self._common is None:
            return self._own
        if self._made is not None and self._made[0] == get_ident():
            k, v = (array() for array in self._made[1:])
            if k is not None and v is not None:
                return Rows(k, v)
        parts = zip(self._common.rows, self._own, strict=True)
        made = Rows(*(mx.concatenate([*self._used(x), own], axis=1) for x, own in parts))
        self._made = get_ident(), weakref.ref(made.k), weakref.ref(made.v)
        return made

    def _used(self, common: mx.array) -> list[mx.array]:
        if (self._start, self._stop) == (self._sinks, common.shape[1]):
            return [common]
        return [common[:, : self._sinks], common[:, self._start : self._stop]]

    def replace(self, rows: Rows) -> None:
        """Become these rows."""
        self._own, self._made = rows, None
        if self._common is not None:
            self._common.users.discard(self)
            self._common, self.stored = None, []

    @property
    def tail(self) -> Rows:
        """The rows that new ones come behind; what is made of them goes to `extend`."""
        if self._common is not None and len(self._common.users) == 1:
            self.replace(self.rows())  # the copies are gone
        return self._own

    def extend(self, tail: Rows) -> None:
        """Take the tail with new rows behind it."""
        self._own, self._made = tail, None

    def known(self, n: int) -> Encoded | None:
        """What a copy stored the oldest n rows of the window as, if they are common."""
        if self._common is None or not self._all_common(n):
            return None
        return self._common.stored.get((self._start, n))

    def _all_common(self, n: int) -> bool:
        """Whether the oldest n rows of the window are common, and not the last of those."""
        return self._start + n < self._stop

    def leave(self, n: int, stored: Encoded | None = None) -> None:
        """The oldest n rows of the window go; they were stored as these blocks."""
        if self._common is not None and self._all_common(n):
            if stored is not None:
                self._common.stored[self._start, n] = stored
                self.stored.append(stored)
            self._start, self._made = self._start + n, None
            return
        start, stop = self._sinks, self._sinks + n
        whole = self.rows()
        self.replace(Rows(*(mx.concatenate([x[:, :start], x[:, stop:]], axis=1) for x in whole)))

    def forget_stored(self) -> None:
        """What left the window is stored otherwise now: hold no blocks for other copies."""
        self.stored = []

    def cut(self, n: int) -> None:
        """The last n rows of the window go."""
        own = _count(self._own)
        if self._common is not None and own <= n < own + self._stop - self._start:
            self._stop -= n - own
            self.extend(_none(self._own))
        elif n <= own:
            self.extend(Rows(*(owned(x[:, : own - n]) for x in self._own)))
        else:
            self.replace(Rows(*(owned(x[:, : x.shape[1] - n]) for x in self.rows())))

    def copy(self) -> ExactRows:
        """The same rows for another layer."""
        if self._common is None and self.count >= self._sinks + TILE:
            self._common = _Common(self._own)
            self._common.users.add(self)
            self._start, self._stop = self._sinks, _count(self._own)
            self.extend(_none(self._own))
        other = ExactRows(self._own, self._sinks)
        if self._common is not None:
            other._common, other._start, other._stop = self._common, self._start, self._stop
            self._common.users.add(other)
            other.stored = list(self.stored)
        return other


def _count(rows: Rows) -> int:
    return int(rows.k.shape[1])


def owned(x: mx.array) -> mx.array:
    """A copy: a slice would keep the whole buffer behind it."""
    return mx.concatenate([x[:, :1], x[:, 1:]], axis=1)


def _none(rows: Rows) -> Rows:
    """No rows of the same kind; a slice without rows would keep what it comes from."""
    return Rows(*(_no_rows(x.shape[0], x.shape[2], x.dtype) for x in rows))


@lru_cache(maxsize=64)
def _no_rows(heads: int, dim: int, dtype: mx.Dtype) -> mx.array:
    rows = mx.zeros((heads, 0, dim), dtype)
    mx.eval(rows)  # copies of what was evaluated can be read in any thread
    return rows
