"""What the operations of a backend work on. Arrays only; nothing here owns a block.

Shapes: H KV heads, Hq query heads, L new tokens, M blocks of the longest head, E exact rows,
Dk and Dv the stored channels of keys and values (multiples of 32). Everything is rotated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

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
class Body:
    """Compressed tokens of one sequence in one format.

    Attributes:
        pool: uint32 [blocks, format.words].
        table: block ids int32 [H, M].
        lengths: slots in use int32 [H]; later slots of a head are garbage.
        full: every head uses all of its M * 32 slots.
    """

    pool: mx.array
    table: mx.array
    lengths: mx.array
    format: Format
    full: bool

    @property
    def slots(self) -> int:
        """M * 32."""
        return 32 * int(self.table.shape[1])


Rotations = tuple[Rotation, Rotation]
"""Of the keys (and queries), and of the values (and outputs)."""


class Attention(NamedTuple):
    """Output [Hq, L, Dv], and the log-sum-exp of the scores, float32 [Hq, L], natural
    logarithm, learned sink logits included.

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
class DecodeInputs:
    """What decode attention reads: the arguments of `kernels.decode_attention.decode_attention`,
    checked there. `skip` is 0 where there is no body, or no exact row to compare with."""

    queries: mx.array
    bodies: Sequence[Body]
    exact: Rows
    centers: Centers | None
    scale: float
    sinks: int
    mask: Mask
    sink_logits: mx.array | None
    rotations: Rotations | None
    skip: float = 0.0


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
        self, rows: Rows, centers: Centers, format: Format, rounding: Rounding
    ) -> mx.array: ...


class GatherOp(Protocol):
    """See `kernels.gather.gather`."""

    def __call__(
        self,
        bodies: Sequence[Body],
        exact: Rows,
        centers: Centers | None,
        *,
        sinks: int,
        dtype: mx.Dtype,
        rotations: Rotations | None,
    ) -> Rows: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation. `widest` is the largest head_dim that it takes, 0 for
    any; layers of a larger one are computed by the reference."""

    name: str
    encode: EncodeOp
    dequantize: Callable[[Body, Centers, mx.Dtype], Rows]
    decode_attention: Callable[[DecodeInputs], Attention]
    prefill_attention: Callable[[PrefillInputs], mx.array]
    gather: GatherOp
    append: Callable[[Rows, Rows, Rotations], Rows]
    repack: Callable[[Body, mx.array], mx.array]
    widest: int = 0
