"""What a cache holds, by name: what `state` gives and `from_state` takes.

Named tuples, because mlx evaluates and maps over tuples and lists of arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from leankv_mlx.kernels import Centers, Rows


class TierState(NamedTuple):
    """Compressed tokens in one format.

    Attributes:
        blocks: those of the pool, uint32 [blocks, words].
        ids: of each head's blocks in it, int32 [H, M].
        lengths: slots in use, int32 [H].
        positions: of the slots in use, head by head, [sum of the lengths]; None if every head has
            every token in order.
        marks: their scores, uint8 [sum of the lengths]; None likewise.
    """

    blocks: mx.array
    ids: mx.array
    lengths: mx.array
    positions: mx.array | None = None
    marks: mx.array | None = None


class BodyState(NamedTuple):
    """The middle of a sequence: what was subtracted, its tiers, and the divisors of the channels of
    its keys, float32 [H, k_dim], if they are equalized."""

    centers: Centers
    tiers: list[TierState]
    key_scales: mx.array | None = None


class LayerState(NamedTuple):
    """One layer without its settings; the observed queries are no part of it."""

    offset: int
    heads: int
    k_dim: int
    v_dim: int
    exact: Rows
    body: BodyState | None = None


class CacheState(NamedTuple):
    """A cache: its `--kv` text, whether it holds what it fetched, and its layer, if it began."""

    kv: str
    keep_fetched: bool
    layer: LayerState | None = None
