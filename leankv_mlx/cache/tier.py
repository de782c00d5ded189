"""Parts of a body: blocks of one format, and which heads of a layer have formats of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.blocks import Among, BlockTable
from leankv_mlx.cache.moves import Mask
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.kernels import Tier
from leankv_mlx.sparsity.marks import Marks

Positions = NDArray[np.int32]
_Rows = TypeVar("_Rows", mx.array, NDArray[Any])


@dataclass(frozen=True)
class Share:
    """KV heads of a layer that are stored in the same formats.

    Attributes:
        formats: of their high tier, and of the low one if there is one.
        among: which heads they are; None for all.
    """

    formats: tuple[Format, ...]
    among: Among | None = None

    @classmethod
    def all_of(cls, formats: Sequence[Format], channels: Channels | None) -> list[Share]:
        """Those of a layer.

        Args:
            formats: where all channels of the keys are kept.
            channels: which of them are; heads that keep none are in no share.
        """
        if channels is None:
            return [cls(tuple(formats))]
        return [
            cls(
                tuple(_keeping(format, kept) for format in formats),
                None if len(heads) == channels.heads else Among(heads, channels.heads),
            )
            for kept, heads in channels.holders()
        ]

    @property
    def rows(self) -> NDArray[np.intp] | slice:
        """Which of the layer's KV heads they are, as an index."""
        return slice(None) if self.among is None else self.among.heads

    def heads(self, of: int) -> int:
        """How many of the layer's KV heads they are."""
        return of if self.among is None else len(self.among.heads)


def _keeping(format: Format, kept: int) -> Format:
    """The same with only the first `kept` groups of the keys."""
    dropped = len(format.k_bits) - kept
    return replace(format, k_bits=format.k_bits[:kept] + (0,) * dropped)


@dataclass
class BodyTier:
    """Blocks of one format, and what is known of each slot beside its codes.

    Shapes: n KV heads, those of the tier.

    Attributes:
        side: positions, as the smallest unsigned integers that hold them, and marks, uint8, see
            `sparsity.marks`; of the used slots alone, head by head, because one head may be many
            times as long as the others. None while every head has every token in order.
    """

    format: Format
    table: BlockTable
    side: tuple[NDArray[Any], Marks] | None = None

    @property
    def slots(self) -> int:
        """Those of its longest head, used or not."""
        return TILE * int(self.table.ids.shape[1])

    @property
    def used(self) -> Mask:
        """bool [n, S]."""
        mask: Mask = np.arange(self.slots) < self.table.lengths[:, None]
        return mask

    def remember(self, positions: Positions, marks: Marks) -> None:
        """Make side data of what is known of the used slots, head by head."""
        kind = np.min_scalar_type(int(positions.max(initial=0)))
        self.side = positions.astype(kind), marks

    def recall(self) -> tuple[Positions, Marks]:
        """The side data for all slots, [n, S]; -1 and 0 where there is no token."""
        used = self.used
        positions, marks = np.full(used.shape, -1, np.int32), np.zeros(used.shape, np.uint8)
        if self.side is not None:
            positions[used], marks[used] = self.side
        return positions, marks

    def positions(self, first: int) -> Positions:
        """Of all slots, int32 [n, S], -1 where there is no token; the first token that was ever
        stored stands at `first`."""
        if self.side is not None:
            return self.recall()[0]
        in_order = np.arange(self.slots, dtype=np.int32) + first
        return np.where(self.used, in_order, np.int32(-1))

    @property
    def nbytes(self) -> int:
        """Bytes of the side data."""
        return sum(x.nbytes for x in self.side) if self.side else 0

    def at(self, columns: NDArray[Any]) -> mx.array:
        """Blocks [n, B, words] at these columns of the table, [n, B]."""
        if not columns.size:
            return mx.zeros((*columns.shape, self.format.words), mx.uint32)
        pool, ids = self.table.pool, np.take_along_axis(self.table.ids, columns, axis=1)
        return pool.array[mx.array(pool.places(ids))]

    def of(self, rows: _Rows) -> _Rows:
        """Of something for each KV head of the layer, [H, ..], that of its own, [n, ..]."""
        among = self.table.among
        if among is None:
            return rows
        return rows[mx.array(among.heads)] if isinstance(rows, mx.array) else rows[among.heads]

    @property
    def rows(self) -> NDArray[np.intp] | slice:
        """Which of the layer's KV heads are its own, as an index."""
        among = self.table.among
        return slice(None) if among is None else among.heads

    def narrowed(self, format: Format, among: Among | None) -> BodyTier:
        """The slots of some of the heads of a tier of all, without the last groups of their keys.
        What is kept is copied bit for bit; no block is written, because copies may have it, too.

        Args:
            format: with 0 bits for the groups that go.
            among: the heads; None for all.
        """
        kept, keys = (TILE * sum(each.k_bits) for each in (format, self.format))
        heads, side = np.arange(self.table.heads) if among is None else among.heads, self.side
        if side is not None:
            own = np.isin(np.repeat(np.arange(self.table.heads), self.table.lengths), heads)
            side = side[0][own], side[1][own]
        table = self.table.parts(heads, [slice(kept), slice(keys, None)], among)
        return BodyTier(format, table, side)

    def view(self) -> Tier:
        """As kernels see it: over all KV heads of the layer."""
        table, among = self.table, self.table.among
        if among is None:
            return Tier(table.pool.array, *table.arrays(), self.format, table.full)
        return Tier(table.pool.array, *table.arrays(), self.format, False, among.heads)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Blocks that tokens have become, in a table for each share of the heads."""

    tables: tuple[BlockTable, ...]


def loose(blocks: mx.array, format: Format) -> Tier:
    """A body of blocks [n, M, words] that belong to no pool."""
    heads, columns, words = blocks.shape
    table = mx.arange(heads * columns, dtype=mx.int32).reshape(heads, columns)
    lengths = mx.full((heads,), columns * TILE, mx.int32)
    return Tier(blocks.reshape(-1, words), table, lengths, format, True)
