"""Which stored tokens stay, and in which tier: policies as objects with one method.

A policy sees the scores of every slot of several layers at once and says where each slot goes. It
plans in NumPy over all heads, without a loop over them; moving the slots is the cache's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.format import TILE
from leankv_mlx.config import CompressionConfig

HIGH, LOW, DROP = 0, 1, -1
"""Tiers. A slot never moves up: what a tier has forgotten is gone."""
LEAST_SLOTS = 256
"""Stored tokens per head that a budget relative to the tokens so far always leaves: short prompts
are small anyway."""
FLOOR = 0.2
"""Share of an equal share of the budget that every head gets, so that none goes blind."""

Scores = NDArray[np.float32]
Tiers = NDArray[np.int8]


@dataclass(frozen=True)
class LayerSlots:
    """The stored tokens of one layer.

    Attributes:
        scores: significance of each slot, float32 [H, S].
        tiers: HIGH or LOW, DROP where a head has no such slot, int8 [H, S].
        slot_nbytes: bytes of a slot in the high and in the low tier (the same where there is
            none), side data included.
        fixed_nbytes: bytes of the layer that no policy touches: sink tokens, a full window,
            centers, observed queries.
        growth_nbytes: what further queries may add to that.
        fp16_nbytes: what an uncompressed fp16 cache of all tokens so far would hold.
        tokens: tokens so far, dropped ones included.
    """

    scores: Scores
    tiers: Tiers
    slot_nbytes: tuple[float, float]
    fixed_nbytes: int
    growth_nbytes: int
    fp16_nbytes: int
    tokens: int


class Policy(Protocol):
    """Where slots go."""

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """The new tier of every slot, int8 [H, S] for each layer; never above the present one."""


@dataclass(frozen=True)
class KeepAll:
    """Every token stays as it is."""

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        return [layer.tiers for layer in layers]


@dataclass(frozen=True)
class Streaming:
    """Sink tokens and window only (StreamingLLM, arXiv 2309.17453)."""

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        return [np.full_like(layer.tiers, DROP) for layer in layers]


@dataclass(frozen=True)
class Threshold:
    """Tiers by significance relative to 1/N (LeanKV, arXiv 2412.03131, section 4).

    Above alpha_high / N a token stays in the high tier, above alpha_low / N it goes to the low
    one, below it is dropped.
    """

    alpha_high: float
    alpha_low: float

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        plans = []
        for layer in layers:
            relative = layer.scores * np.float32(layer.tokens)
            wanted = np.where(
                relative > self.alpha_high, HIGH, np.where(relative > self.alpha_low, LOW, DROP)
            )
            plans.append(_not_above(layer.tiers, wanted))
        return plans


@dataclass(frozen=True)
class Budget:
    """Bytes shared by heads by significance (AdaKV, arXiv 2407.11550).

    All slots of a layer (or of the model) compete for its bytes. The most significant ones take
    the `high` share of them at the price of the high tier, the next ones the rest at that of the
    low tier. Heads get whole blocks, and each at least FLOOR of an equal share.

    Attributes:
        ratio: bytes of an uncompressed fp16 cache of the tokens so far, over those that may stay.
            LEAST_SLOTS per head stay in any case.
        nbytes: bytes of all layers together, however many tokens come; 0 for no such limit.
        high: share of the bytes for the high tier; 1 where there is no low one.
        whole_model: heads of all layers compete, instead of those of one layer.
    """

    ratio: float
    nbytes: int = 0
    high: float = 1.0
    whole_model: bool = False

    def plan(self, layers: Sequence[LayerSlots]) -> list[Tiers]:
        """See `Policy`."""
        if self.whole_model:
            return self._plan_together(layers, self.nbytes)
        share = max(1, self.nbytes // max(1, len(layers))) if self.nbytes else 0
        return [plan for layer in layers for plan in self._plan_together([layer], share)]

    def _plan_together(self, layers: Sequence[LayerSlots], nbytes: int) -> list[Tiers]:
        shape = (sum(x.tiers.shape[0] for x in layers), max(x.tiers.shape[1] for x in layers))
        scores, tiers = np.full(shape, -np.inf, np.float32), np.full(shape, DROP, np.int8)
        prices = np.zeros((2, shape[0]))  # of a slot of each head, in each tier
        row = 0
        for layer in layers:
            heads, slots = layer.tiers.shape
            used = layer.tiers != DROP
            scores[row : row + heads, :slots] = np.where(used, layer.scores, -np.inf)
            tiers[row : row + heads, :slots] = layer.tiers
            prices[:, row : row + heads] = np.array(layer.slot_nbytes)[:, None]
            row += heads
        room = self._room(layers, float(prices[0].sum()), nbytes)
        place = _ranks_in_rows(scores)
        high = _slots_per_head(scores, prices[0], self.high * room)
        low = np.zeros_like(high)
        if self.high < 1:
            behind = np.where(place < high[:, None], -np.inf, scores)
            low = _slots_per_head(behind, prices[1], (1 - self.high) * room)
        wanted = np.where(
            place < high[:, None], HIGH, np.where(place < (high + low)[:, None], LOW, DROP)
        )
        plan, plans, row = _not_above(tiers, wanted), [], 0
        for layer in layers:
            heads, slots = layer.tiers.shape
            plans.append(plan[row : row + heads, :slots])
            row += heads
        return plans

    def _room(self, layers: Sequence[LayerSlots], price: float, nbytes: int) -> float:
        """Bytes for slots; `price` is that of one slot of every head."""
        fixed = sum(layer.fixed_nbytes for layer in layers)
        share = sum(layer.fp16_nbytes for layer in layers) / self.ratio - fixed
        room = max(LEAST_SLOTS * price, share)
        if not nbytes:
            return room
        # Until the next plan queries may come, and a block of new tokens before others go.
        growth = sum(layer.growth_nbytes for layer in layers) + TILE * price
        return min(room, max(0, nbytes - fixed - growth))


def policy_of(config: CompressionConfig) -> Policy:
    """The policy that a configuration names."""
    if config.policy == "threshold":
        return Threshold(config.alpha_high, config.alpha_low)
    if config.policy == "budget":
        high = config.high if len(config.tiers) > 1 else 1.0
        return Budget(config.ratio, config.budget, high, config.scope == "model")
    return Streaming() if config.policy == "streaming" else KeepAll()


def _not_above(present: Tiers, wanted: NDArray[np.int_]) -> Tiers:
    lower = np.where((present == LOW) & (wanted == HIGH), LOW, wanted)
    return np.where(present == DROP, DROP, lower).astype(np.int8)


def _ranks_in_rows(scores: Scores) -> NDArray[np.int64]:
    """Rank of every slot in its head, 0 for the highest score; earlier slots win ties."""
    order = _descending(scores)
    ranks = np.empty(scores.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None].repeat(len(scores), 0), 1)
    return ranks


def _descending(scores: Scores) -> NDArray[np.int64]:
    """Indices that sort the last axis from high to low, earlier ones first among equals.

    What a stable argsort gives, but NumPy sorts 16-bit numbers by radix, several times faster: one
    pass for scores that come from marks, whose lower half is zero, and two for others.

    Args:
        scores: at least 0, or -inf.
    """
    bits = np.uint32(0x7F800000) - np.abs(scores).view(np.uint32)  # of floats, ordered as they are
    keys = np.where(np.isfinite(scores), bits, np.uint32(0x7F810000))
    upper, lower = (keys >> np.uint32(16)).astype(np.uint16), keys.astype(np.uint16)
    if not lower.any():
        return np.argsort(upper, axis=-1, kind="stable")
    order = np.argsort(lower, axis=-1, kind="stable")
    again = np.argsort(np.take_along_axis(upper, order, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(order, again, axis=-1)


def _slots_per_head(scores: Scores, price: NDArray[np.float64], room: float) -> NDArray[np.int64]:
    """How many of its best slots each head keeps of what `room` bytes hold: whole blocks.

    The shares follow the ranking of all slots; the floor is taken off the others in proportion,
    and bytes that rounding down leaves over go to the largest remainders.

    Args:
        scores: [H, S]; -inf for slots that do not compete.
        price: bytes of a slot of each head, [H].
        room: bytes.
    """
    heads, width = scores.shape
    present = np.isfinite(scores)
    available = present.sum(axis=1)
    blocks_available = -(-available // TILE)
    if float((blocks_available * TILE * price).sum()) <= room:
        return np.asarray(blocks_available * TILE)
    order = _descending(scores.ravel())[: int(available.sum())]
    owner = order // width
    affordable = np.cumsum(price[owner]) <= room
    share = np.bincount(owner[affordable], minlength=heads).astype(np.float64)
    least = np.minimum(FLOOR * room / max(float(price.sum()), 1e-9), available)
    above = np.maximum(share - least, 0)
    spare = max(0.0, room - float((least * price).sum()))
    share = least + above * min(1.0, spare / max(float((above * price).sum()), 1e-9))
    whole = np.minimum(np.floor(share / TILE + 1e-9), blocks_available)
    remainder = np.where(whole < blocks_available, share / TILE - whole, -1.0)
    by_remainder = np.argsort(-remainder, kind="stable")
    left = room - float((whole * TILE * price).sum())
    extra = (np.cumsum(TILE * price[by_remainder]) <= left) & (remainder[by_remainder] >= 0)
    whole[by_remainder[extra]] += 1
    return np.asarray(whole * TILE, np.int64)
