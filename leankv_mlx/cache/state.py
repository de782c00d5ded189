"""What a cache holds, by name: what `state` gives and `from_state` takes.

Named tuples, because mlx evaluates and maps over tuples and lists of arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from leankv_mlx.codec.basis import Basis
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.space import Learned
from leankv_mlx.kernels import Centers, Rows


class TierState(NamedTuple):
    """Compressed tokens in one format.

    Attributes:
        blocks: those of the pool, uint32 [blocks, words].
        ids: of each head's blocks in it, int32 [H, M].
        lengths: slots in use, int32 [H]; 0 for heads that have other tiers.
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
    """The middle of a sequence: what was subtracted, its tiers, share by share of the heads (see
    `cache.tier`), and the divisors of the channels of its keys, float32 [H, k_dim], if they are
    equalized."""

    centers: Centers
    tiers: list[TierState]
    key_scales: mx.array | None = None


class LayerState(NamedTuple):
    """One layer without its settings; the observed queries are no part of it, but whether its codes
    keep only what its channels say."""

    offset: int
    heads: int
    k_dim: int
    v_dim: int
    exact: Rows
    body: BodyState | None = None
    narrowed: bool = False


class ChannelsState(NamedTuple):
    """Which key channels codes keep: see `codec.channels.Channels`.

    Attributes:
        order: int32 [H, k_dim].
        groups: int32 [H].
    """

    order: mx.array
    groups: mx.array

    @classmethod
    def of(cls, channels: Channels) -> ChannelsState:
        """Those of a cache."""
        return cls(channels.forth, mx.array(channels.groups, mx.int32))

    def read(self) -> Channels:
        """What `of` was given.

        Raises:
            ConfigError: they are no channels of a layer.
        """
        return Channels.of(np.array(self.order), np.array(self.groups))


class BasisState(NamedTuple):
    """A basis of keys: see `codec.basis.Basis`.

    Attributes:
        matrix: float16 [H, k_dim, k_dim].
        costs: float16 [H, k_dim].
    """

    matrix: mx.array
    costs: mx.array

    @classmethod
    def of(cls, basis: Basis) -> BasisState:
        """That of a cache."""
        return cls(basis.matrix, basis.costs)

    def read(self) -> Basis:
        """What `of` was given.

        Raises:
            ConfigError: it is no basis.
        """
        return Basis.shared(np.array(self.matrix), np.array(self.costs))


class CacheState(NamedTuple):
    """A cache: its `--kv` text, whether it holds what it fetched, its layer, if it began, its
    channels, unless it keeps all, and its basis, if it has one."""

    kv: str
    keep_fetched: bool
    layer: LayerState | None = None
    channels: ChannelsState | None = None
    basis: BasisState | None = None

    @classmethod
    def made(
        cls, kv: str, keep_fetched: bool, layer: LayerState | None, learned: Learned | None
    ) -> CacheState:
        """Of a cache for whose keys this was learned."""
        channels = ChannelsState.of(learned) if isinstance(learned, Channels) else None
        basis = BasisState.of(learned) if isinstance(learned, Basis) else None
        return cls(kv, keep_fetched, layer, channels, basis)

    def learned(self) -> Learned | None:
        """What was learned of its keys.

        Raises:
            ConfigError: it is nothing that is ever learned.
        """
        if self.channels is not None:
            return self.channels.read()
        return None if self.basis is None else self.basis.read()

    @classmethod
    def of(cls, value: Iterable[Any]) -> CacheState:
        """A state from what mlx-lm's own files make of one: nested lists without names. Those of
        earlier versions were one list."""
        if isinstance(value, cls):
            return value
        kv, keep_fetched, *rest = value
        channels = basis = None
        if rest and not isinstance(rest[0], int):  # not of an earlier version
            kept, turned = (*rest[1:], None, None)[:2]
            channels = None if kept is None else ChannelsState(*kept)
            basis = None if turned is None else BasisState(*turned)
        if not rest or rest[0] is None:
            return cls(kv, keep_fetched, None, channels, basis)
        if isinstance(rest[0], int):  # of an earlier version
            offset, heads, k_dim, v_dim, k, v, *middle = rest
            numbers, exact, narrowed = (offset, heads, k_dim, v_dim), (k, v), False
            body = None
            if middle:
                mu_k, mu_v, tiers, *scales = middle
                body = ((mu_k, mu_v), tiers, *scales)
        else:
            offset, heads, k_dim, v_dim, exact, body, *acts = rest[0]
            numbers, narrowed = (offset, heads, k_dim, v_dim), bool(acts and acts[0])
        layer = LayerState(*numbers, Rows(*exact), None, narrowed)
        if body is not None:
            centers, tiers, *scales = body
            made = BodyState(Centers(*centers), [TierState(*t) for t in tiers], *scales)
            layer = layer._replace(body=made)
        return cls(kv, keep_fetched, layer, channels, basis)
