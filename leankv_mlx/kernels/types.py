"""What the operations of a backend work on. Arrays only; nothing here owns a block.

Shapes: H KV heads, Hq query heads, L new tokens, M blocks of the longest head, E exact rows,
Dk and Dv the stored channels of keys and values (multiples of 32). Everything is rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.codecs import CUBIC
from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import Rotation
from leankv_mlx.config import Rounding

MAX_DECODE_TOKENS = 8
"""New tokens up to which attention reads codes; more of them are a prefill."""


class Rows(NamedTuple):
    """Keys [H, T, Dk] and values [H, T, Dv] of the same tokens."""

    k: mx.array
    v: mx.array


class Centers(NamedTuple):
    """What was subtracted from body vectors before encoding: float32 [H, Dk] and [H, Dv]."""

    k: mx.array
    v: mx.array


@dataclass(frozen=True)
class Tier:
    """Compressed tokens in one format.

    Attributes:
        pool: uint32 [blocks, format.words].
        table: block ids int32 [H, M].
        lengths: slots in use int32 [H]; later slots of a head are garbage.
        full: every head uses all of its M * 32 slots.
        heads: the KV heads that hold all of these tokens, ascending, where the others are stored in
            other formats; None if any head may.
    """

    pool: mx.array
    table: mx.array
    lengths: mx.array
    format: Format
    full: bool
    heads: NDArray[np.intp] | None = None

    @property
    def slots(self) -> int:
        """M * 32."""
        return 32 * int(self.table.shape[1])

    def own(self) -> Tier:
        """Over its heads alone."""
        table, lengths = self.of(self.table), self.of(self.lengths)
        return replace(self, table=table, lengths=lengths, heads=None)

    def of(self, x: mx.array) -> mx.array:
        """Of rows for each KV head, [H, ..], those of its heads."""
        return x if self.heads is None else x[mx.array(self.heads)]


Rotations = tuple[Rotation, Rotation]
"""Of the keys (and queries), and of the values (and outputs)."""


@dataclass(frozen=True)
class View:
    """The tokens of a layer as kernels see them, in order: sink tokens, tiers, window.

    Attributes:
        tiers: the compressed tokens; a head's are in any of them, those of no use have length 0.
        exact: uncompressed rows [H, E, D], the sink tokens first, then the window.
        centers: of the tiers; None while there is none.
        sinks: how many of the exact rows are sink tokens.
        rotations: the space of all that is stored. None if queries come in that space, and outputs
            are wanted in it.
        skip: attention weight below which decode may leave values out, see
            `kernels.decode_attention`; 0 for none.
    """

    tiers: Sequence[Tier]
    exact: Rows
    centers: Centers | None
    sinks: int
    rotations: Rotations | None
    skip: float = 0.0

    @property
    def starts(self) -> list[int]:
        """Behind how many slots of other tiers those of each tier stand in the rows that `gather`
        gives. Tiers of the same heads follow each other, those of other heads stand side by
        side."""
        ends = np.zeros(self.exact.k.shape[0], np.int64)
        starts = []
        for tier in self.tiers:
            heads = slice(None) if tier.heads is None else tier.heads
            starts.append(int(ends[heads].max()))
            ends[heads] = starts[-1] + tier.slots
        return starts

    @property
    def slots(self) -> int:
        """Those of a head in all tiers, used or not."""
        pairs = zip(self.starts, self.tiers, strict=True)
        return max((start + tier.slots for start, tier in pairs), default=0)

    @property
    def whole(self) -> bool:
        """Whether the rows that `gather` gives are all tokens, in order. Centers without a tier are
        those of tokens that no head holds."""
        if not self.tiers:
            return self.centers is None
        return len(self.tiers) <= 1 and all(tier.full for tier in self.tiers)

    def present(self) -> mx.array | None:
        """Which of the rows that `gather` gives are tokens, bool [H, N]; None if all are."""
        if all(tier.full for tier in self.tiers):
            return None
        heads, exact = self.exact.k.shape[:2]
        stored = mx.zeros((heads, self.slots), mx.bool_)
        for start, tier in zip(self.starts, self.tiers, strict=True):
            used = mx.arange(tier.slots) < tier.lengths[:, None]
            stored[:, start : start + tier.slots] |= used
        before = mx.ones((heads, self.sinks), mx.bool_)
        behind = mx.ones((heads, exact - self.sinks), mx.bool_)
        return mx.concatenate([before, stored, behind], axis=1)


class Attention(NamedTuple):
    """Output [Hq, L, Dv], and the log-sum-exp of the scores, float32 [Hq, L], natural
    logarithm, learned sink logits included. Of a batch [B, Hq, L, Dv] and [B, Hq, L].

    Attributes:
        reads: int32 [n, 2], to be summed over n: blocks whose values were read, and all blocks. A
            backend that takes the query rows of a KV head in turns counts each turn. None without
            `skip`.
    """

    out: mx.array
    lse: mx.array
    reads: mx.array | None = None


Mask = mx.array | str | None
"""None, "causal", or an array [.., L, N] over all N tokens in order: bool (True = attend) or
additive."""


@dataclass(frozen=True)
class PrefillInputs:
    """What prefill attention reads: the arguments of
    `kernels.prefill_attention.prefill_attention`, checked there."""

    queries: mx.array
    rows: Rows
    scale: float
    mask: Mask
    present: mx.array | None
    sink_logits: mx.array | None
    rotations: Rotations


class EncodeOp(Protocol):
    """See `kernels.encode.encode`."""

    def __call__(
        self,
        rows: Rows,
        centers: Centers,
        format: Format,
        rounding: Rounding,
        shaping: mx.array | None,
    ) -> mx.array: ...


class DecodeOp(Protocol):
    """See `kernels.decode_attention.decode_attention`."""

    def __call__(
        self,
        queries: mx.array,
        view: View,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None,
    ) -> Attention: ...


Scales = Sequence[mx.array | None]
"""Of each of several sequences, float32 [H, head_dim]: its new keys are divided by them and its
queries multiplied before they are rotated, see `codec.equalize`. None for 1."""


class AppendBatchOp(Protocol):
    """See `kernels.append.append_batch`."""

    def __call__(
        self, exact: Sequence[Rows], new: Rows, rotations: Rotations, scales: Scales
    ) -> list[Rows]: ...


class DecodeBatchOp(Protocol):
    """See `kernels.decode_attention.decode_attention_batch`."""

    def __call__(
        self,
        queries: mx.array,
        views: Sequence[View],
        *,
        scale: float,
        mask: str | None,
        sink_logits: mx.array | None,
        scales: Scales,
    ) -> Attention: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation. `widest`: stored channels that its kernels have room
    for, 0 for any. `codecs`: those that they know, none for any. Operations on a batch are None
    where it takes one sequence after another."""

    name: str
    encode: EncodeOp
    dequantize: Callable[[Tier, Centers, mx.Dtype], Rows]
    decode_attention: DecodeOp
    prefill_attention: Callable[[PrefillInputs], mx.array]
    gather: Callable[[View, mx.Dtype], Rows]
    append: Callable[[Rows, Rows, Rotations], Rows]
    repack: Callable[[Tier, mx.array], mx.array]
    decode_attention_batch: DecodeBatchOp | None = None
    append_batch: AppendBatchOp | None = None
    widest: int = 0
    codecs: tuple[str, ...] = (CUBIC,)

    def supports(self, format: Format) -> bool:
        """Whether it computes layers of this format; the reference computes all others."""
        known = not self.codecs or format.codec in self.codecs
        return known and (not self.widest or max(format.k_dim, format.v_dim) <= self.widest)
