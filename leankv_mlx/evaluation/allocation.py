"""Bits for each layer and side of a model, where they take most divergence away.

What is measured, through the real cache: the KL divergence from the uncompressed model with 3 bits
in one layer's keys or values and 8 everywhere else, for each of them; and with 2, 3 and 4 bits in
the keys of all layers, and in the values of all. The first says how much a layer matters, the
second how a divergence falls with the bits. Divergences of layers add up nearly, so bits are bought
one after another, where a bit buys most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.config import UNCOMPRESSED, CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.evaluation.fidelity import Corpus, run_fidelity
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.policies import KeepAll
from leankv_mlx.settings import BITS, Bits

LEVELS = tuple(sorted(BITS))
_ALONE = LEVELS.index(3)
"""What a layer is lowered to alone: few enough to show, enough to be near what is chosen."""

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Allocation:
    """Bits of every compressed layer.

    Attributes:
        bits: of the keys and values of each.
        kld: mean KL divergence, measured with all of them in place.
        uniform: the largest bits alike in all layers within the same limit, and their divergence.
    """

    bits: tuple[Bits, ...]
    kld: float
    uniform: tuple[Bits, float]

    @property
    def mean(self) -> float:
        """Bits of an element, in the mean over layers and sides."""
        return float(np.mean(self.bits))


def allocate(
    loaded: LoadedModel,
    base: CompressionConfig,
    layers: int,
    limits: Sequence[float],
    corpus: Corpus,
    advance: Advance,
) -> list[Allocation]:
    """Bits for each layer and side, for each limit of their mean.

    Args:
        base: everything else; its own bits are not used.
        layers: compressed layers of the model.
        limits: bits per element of the codes, each from 2 to 8.

    Raises:
        UsageError: the bits are out of range.
    """
    for bits in limits:
        if not LEVELS[0] <= bits <= LEVELS[-1]:
            raise UsageError(f"--bits {bits:g} is out of range; use {LEVELS[0]} to {LEVELS[-1]}.")
    plain = replace(base, policy=KeepAll(), layer_bits=())
    cost = _costs(loaded, plain, layers, corpus, advance)
    chosen = [np.array(LEVELS)[_greedy(cost, LEVELS, bits)] for bits in limits]
    uniform = [_uniform(bits) for bits in limits]
    ours = [_arm(plain, bits) for bits in chosen]
    theirs = [_arm(plain, np.tile(bits, (layers, 1))) for bits in uniform]
    found = _klds(loaded, list({arm.kv: arm for arm in (*ours, *theirs)}.values()), corpus, advance)
    return [
        Allocation(tuple((int(k), int(v)) for k, v in bits), found[a.kv], (same, found[b.kv]))
        for bits, same, a, b in zip(chosen, uniform, ours, theirs, strict=True)
    ]


def _costs(
    loaded: LoadedModel, plain: CompressionConfig, layers: int, corpus: Corpus, advance: Advance
) -> NDArray[np.float64]:
    """What each layer, side and level costs, [layers, 2, levels]; see the top of this file."""
    top = np.full((layers, 2), LEVELS[-1])

    def lowered(where: tuple[int | slice, int], level: int) -> Arm:
        bits = top.copy()
        bits[where] = level
        return _arm(plain, bits)

    alone = [lowered((i, side), LEVELS[_ALONE]) for i in range(layers) for side in range(2)]
    sides = [lowered((slice(None), side), x) for side in range(2) for x in LEVELS[:-1]]
    every = {arm.kv: arm for arm in (*alone, *sides)}  # of one layer they are the same
    found = _klds(loaded, list(every.values()), corpus, advance)
    falls = np.zeros((2, len(LEVELS)))
    falls[:, :-1] = np.reshape([found[arm.kv] for arm in sides], (2, -1))
    falls /= np.maximum(falls[:, _ALONE : _ALONE + 1], 1e-12)
    each: NDArray[np.float64] = np.reshape([found[arm.kv] for arm in alone], (layers, 2))
    return each[:, :, None] * falls


def _greedy(cost: NDArray[np.float64], levels: Sequence[int], bits: float) -> NDArray[np.int64]:
    """Index of the level of each layer and side: from the lowest, the step that takes most
    divergence away for its bits, as long as there are bits left."""
    at: NDArray[np.int64] = np.zeros((cost.shape[0], cost.shape[1]), np.int64)
    left = bits * at.size - levels[0] * at.size
    while True:
        best, price = 0.0, 0
        where: tuple[tuple[int, int], int] | None = None
        for index in product(range(at.shape[0]), range(at.shape[1])):
            # Steps over several levels, too: a cost curve need not be convex.
            now = int(at[index])
            for step in range(now + 1, len(levels)):
                extra = levels[step] - levels[now]
                gain = (cost[index][now] - cost[index][step]) / extra
                if extra <= left and gain > best:
                    best, where, price = gain, (index, step), extra
        if where is None:
            return at
        at[where[0]] = where[1]
        left -= price


def _uniform(bits: float) -> Bits:
    """The largest setting alike in all layers with a mean of at most `bits`; keys first."""
    pairs = [(k, v) for k in BITS for v in BITS if (k + v) / 2 <= bits]
    return max(pairs, key=lambda pair: (sum(pair), pair[0] - abs(pair[0] - pair[1])))


def _arm(config: CompressionConfig, bits: NDArray[np.int64]) -> Arm:
    config = replace(config, layer_bits=tuple((int(k), int(v)) for k, v in bits))
    return Arm(config.spec().removeprefix("leankv:"), config)


def _klds(
    loaded: LoadedModel, arms: Sequence[Arm], corpus: Corpus, advance: Advance
) -> dict[str, float]:
    found = run_fidelity(loaded, [Arm(UNCOMPRESSED, None), *arms], corpus, advance)
    return {arm.kv: found[arm.kv].kld["mean"] for arm in arms}
