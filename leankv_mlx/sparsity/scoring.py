"""How much attention each stored token gets from the most recent queries.

The significance of a token for a KV head is the mean attention weight that it receives from an
observation window of queries, the maximum over the query heads of the group (LeanKV,
arXiv 2412.03131, section 4). What is made of it is a scorer's, see `leankv_mlx.scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.format import TILE
from leankv_mlx.kernels import Backend, Centers, Tier
from leankv_mlx.kernels.dequantize import dequantize
from leankv_mlx.sparsity.observations import Observed

_SLAB = 64
"""Blocks of a body that are decoded at a time; no score matrix of all tokens ever exists."""

_FEW_KEYS = 512
"""Up to so many keys, those of a window, a product stays lazy."""
_QUERIES = 128
"""Queries whose weights over all tokens exist at a time."""

Positions = NDArray[np.int32]


@dataclass(frozen=True)
class Stored:
    """A tier: its body, and the positions of the slots of its heads, int32 [n, M * 32], -1 where
    there is no token."""

    body: Tier
    positions: Positions


@dataclass(frozen=True)
class Exact:
    """Uncompressed keys in the space of the stored ones, [H, E, D], and their positions [E]."""

    keys: mx.array
    positions: Positions


class _Scorer:
    """Scores of keys for the observed queries, KV head by KV head."""

    def __init__(self, observed: Observed, heads: int) -> None:
        self.shape = heads, observed.queries.shape[0] // heads, observed.queries.shape[1]
        self._queries = (observed.queries * observed.scale).reshape(
            heads, -1, observed.queries.shape[2]
        )
        self._at = observed.positions

    def of(self, tier: Tier) -> _Scorer:
        """For the heads of a tier alone."""
        if tier.heads is None:
            return self
        scorer = copy(self)
        scorer._queries = tier.of(self._queries)
        scorer.shape = len(tier.heads), *self.shape[1:]
        return scorer

    def scores(self, keys: mx.array, positions: Positions) -> tuple[mx.array, mx.array | None]:
        """Keys [H, n, D] at [H, n] -> scores [H, G, R, n], -inf where a query does not see the
        key, and whether it does, bool [H, R, n]; None if all see all, as most of a prompt is."""
        s = _products(self._queries, keys).reshape(*self.shape, -1)
        if positions.size and positions.min() >= 0 and positions.max() <= self._at.min():
            return s, None
        where = mx.array(positions)[:, None]
        visible = (where >= 0) & (where <= mx.array(self._at)[:, None])
        return mx.where(visible[:, None], s, -mx.inf), visible

    def received(self, keys: mx.array, positions: Positions, lse: mx.array) -> mx.array:
        """Mean weight over the queries that see a key, the largest of the group: [H, n]."""
        s, visible = self.scores(keys, positions)
        weights = mx.exp(s - lse.reshape(*self.shape, 1))
        if visible is None:
            return weights.mean(axis=2).max(axis=1)
        mean = weights.sum(axis=2) / mx.maximum(visible.sum(axis=1), 1)[:, None]
        return mean.max(axis=1)


def significance(
    observed: Observed,
    stored: Sequence[Stored],
    exact: Exact,
    centers: Centers,
    backend: Backend,
) -> tuple[list[mx.array], mx.array, mx.array]:
    """Attention received by every token, in two passes over the keys: first each query's
    normalizer, then the weights.

    Args:
        observed: the queries.
        stored: the compressed tokens, one entry for each tier.
        exact: sink tokens and window.
        centers: of the bodies.
        backend: who decodes.

    Returns:
        Scores float32 [H, M * 32] of each tier (0 for slots without a token) and [H, E] of the
        exact rows; and the log-sum-exps float32 [Hq, R] of the queries.
    """
    heads = exact.keys.shape[0]
    scorer = _Scorer(observed, heads)
    slabs = [
        (i, _slab(tier.body, centers, backend, start), _where(tier.positions, start))
        for i, tier in enumerate(stored)
        for start in range(0, tier.body.table.shape[1], _SLAB)
    ]
    scorers = [scorer.of(tier.body) for tier in stored]
    everywhere = _everywhere(exact.positions, heads)
    s = scorer.scores(exact.keys, everywhere)[0]
    # A trim may have left no exact row.
    lse = mx.logsumexp(s, axis=-1) if s.shape[-1] else mx.full(s.shape[:-1], -mx.inf)
    if observed.sink_logits is not None:
        logits = observed.sink_logits.astype(mx.float32).reshape(*scorer.shape[:2], 1)
        lse = mx.logaddexp(lse, logits)
    for i, decode, where in slabs:
        tier, more = stored[i].body, mx.logsumexp(scorers[i].scores(decode(), where)[0], axis=-1)
        lse = _put(lse, tier, mx.logaddexp(tier.of(lse), more))
        mx.eval(lse)  # one slab at a time
    result: list[list[mx.array]] = [[mx.zeros((heads, 0))] for _ in stored]
    for i, decode, where in slabs:
        tier = stored[i].body
        weights = scorers[i].received(decode(), where, tier.of(lse))
        result[i].append(_put(mx.zeros((heads, weights.shape[1])), tier, weights))
        mx.eval(result[i][-1])
    of_exact = scorer.received(exact.keys, everywhere, lse)
    flat = lse.reshape(-1, lse.shape[-1])
    return [mx.concatenate(parts, axis=1) for parts in result], of_exact, flat


def received(observed: Observed, exact: Exact) -> mx.array:
    """Attention received by uncompressed tokens alone, float32 [H, E].

    Raises:
        ValueError: the queries come without their log-sum-exps.
    """
    if observed.lse is None:
        raise ValueError("[received] expected queries with their log-sum-exps.")
    heads = exact.keys.shape[0]
    scorer = _Scorer(observed, heads)
    return scorer.received(exact.keys, _everywhere(exact.positions, heads), observed.lse)


class LargestReceived:
    """The largest attention weight that each stored token receives in any of several prefill
    calls (KVzip, arXiv 2505.23416).

    Attributes:
        scores: float32 [H, S], None before the first call.
    """

    def __init__(self) -> None:
        self.scores: mx.array | None = None

    def add(
        self,
        queries: mx.array,
        keys: mx.array,
        stored: slice,
        scale: float,
        sink_logits: mx.array | None,
        present: mx.array | None,
    ) -> None:
        """Take one call into account.

        Args:
            queries: in the space of the keys, [Hq, L, D], the last L of the N tokens.
            keys: [H, N, D], in order.
            stored: the S of them that are stored tokens.
            scale, sink_logits: as in `kernels.decode_attention`.
            present: bool [H, N], False for slots without a token; None if there are none.
        """
        (heads, tokens, dim), length = keys.shape, queries.shape[1]
        for start in range(0, length, _QUERIES):
            stop = min(start + _QUERIES, length)
            q = queries[:, start:stop].astype(mx.float32) * scale
            s = _products(q.reshape(heads, -1, dim), keys)
            s = s.reshape(heads, -1, stop - start, tokens)
            at = mx.arange(tokens - length + start, tokens - length + stop)[:, None]
            s = mx.where(mx.arange(tokens) <= at, s, -mx.inf)
            if present is not None:
                s = mx.where(present[:, None, None], s, -mx.inf)
            lse = mx.logsumexp(s, axis=-1, keepdims=True)
            if sink_logits is not None:
                logits = sink_logits.astype(mx.float32).reshape(heads, -1, 1, 1)
                lse = mx.logaddexp(lse, logits)
            best = mx.exp(s - lse)[..., stored].max(axis=(1, 2))
            self.scores = best if self.scores is None else mx.maximum(self.scores, best)
            mx.eval(self.scores)  # one tile's weights at a time


def _products(queries: mx.array, keys: mx.array) -> mx.array:
    """Queries [H, n, D] times keys [H, N, D]: float32 [H, n, N].

    Large ones are left to NumPy on the CPU, where MLX's own product takes 17 times as long; so
    they are there when this returns.
    """
    keys = keys.astype(mx.float32)
    if mx.default_device().type != mx.DeviceType.cpu or keys.shape[1] < _FEW_KEYS:
        return queries @ keys.swapaxes(1, 2)
    return mx.array(np.matmul(np.array(queries), np.array(keys).swapaxes(1, 2)))


def _slab(body: Tier, centers: Centers, backend: Backend, start: int) -> Callable[[], mx.array]:
    part = replace(body, table=body.table[:, start : start + _SLAB]).own()
    own = Centers(*map(body.of, centers))
    return lambda: dequantize(part, own, mx.float32, backend).k


def _put(rows: mx.array, tier: Tier, own: mx.array) -> mx.array:
    """Rows for each KV head, [H, ..], with others for the heads of a tier, [n, ..]."""
    if tier.heads is None:
        return own
    rows[mx.array(tier.heads)] = own
    return rows


def _where(positions: Positions, start: int) -> Positions:
    return positions[:, TILE * start : TILE * (start + _SLAB)]


def _everywhere(positions: Positions, heads: int) -> Positions:
    return np.broadcast_to(positions, (heads, len(positions)))
