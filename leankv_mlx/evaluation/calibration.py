"""Calibration: the smallest cache that stays within limits, found by measuring.

Two searches, each through the real cache. `allocate` gives every layer and side its own bits under
a byte budget: what lowering each of them alone costs is measured as KL divergence, and bits are
bought where a byte buys most. `sweep` measures candidates of a policy, from small to large, and
takes the smallest that is close enough to the uncompressed model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from leankv_mlx.config import UNCOMPRESSED, CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.arms import Arm, Size
from leankv_mlx.evaluation.fidelity import Corpus, run_fidelity
from leankv_mlx.evaluation.retrieval import Cell, run_retrieval
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.policies import Budget, KeepAll, Policy, Threshold
from leankv_mlx.settings import BITS, Bits

RATIOS = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
ALPHAS = ((30.0, 10.0), (16.0, 4.0), (8.0, 2.0), (4.0, 1.0), (2.0, 0.5), (1.0, 0.2), (1.0, 0.02))
"""The scores of pooled neighbourhoods are above those of single tokens, which the values of the
LeanKV paper are for."""

_APART = 1.001
"""Sizes that differ by less are the same."""

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Limits:
    """What a candidate may lose.

    Attributes:
        kld: mean KL divergence from the uncompressed model, in nats.
        points: retrieval, in hundredths of its mean score, where the uncompressed model is able
            to answer.
    """

    kld: float
    points: float


@dataclass(frozen=True)
class Candidate:
    """A setting and what was measured of it; `retrieval` is None where there was nothing to
    compare."""

    kv: str
    size: Size
    kld: float
    retrieval: float | None
    within: bool


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


def candidates(base: CompressionConfig) -> list[Arm]:
    """The settings that a sweep of the base's policy measures, the smallest caches first.

    Raises:
        UsageError: the policy has nothing to sweep.
    """
    policy, policies = base.policy, list[Policy]()
    if isinstance(policy, Budget):
        policies += [replace(policy, ratio=ratio) for ratio in reversed(RATIOS)]
    elif isinstance(policy, Threshold):
        policies += [replace(policy, alpha_high=high, alpha_low=low) for high, low in ALPHAS]
    else:
        raise UsageError(
            f"policy={policy.name} has nothing to calibrate; use policy=budget or policy=threshold."
        )
    configs = [replace(base, policy=each) for each in policies]
    return [Arm(config.spec().removeprefix("leankv:"), config) for config in configs]


def sweep(
    loaded: LoadedModel,
    arms: Sequence[Arm],
    limits: Limits,
    corpus: Corpus,
    cells: Sequence[Cell],
    samples: int,
    advance: Advance,
) -> list[Candidate]:
    """Measure every arm beside the uncompressed cache, in the order given, see `measured`."""
    every = [Arm(UNCOMPRESSED, None), *arms]
    sizes: dict[str, Size] = {}
    found = run_fidelity(loaded, every, corpus, advance, sizes=sizes)
    retrieval = run_retrieval(loaded, every, cells, samples, advance)
    solved = retrieval.solved()

    def mean(kv: str) -> float:
        values = [x for cell in solved for x in retrieval.scores[kv][cell]]
        return float(np.mean(values))

    results = []
    for arm in arms:
        kld = found[arm.kv].kld["mean"]
        score = mean(arm.kv) if solved else None
        lost = 100 * (mean(UNCOMPRESSED) - score) if score is not None else 0.0
        within = kld <= limits.kld and lost <= limits.points
        results.append(Candidate(arm.kv, sizes[arm.kv], kld, score, within))
    return results


def measured(found: Sequence[Candidate]) -> list[Candidate]:
    """Those of a sweep that showed what they do: they dropped tokens, and more than every milder
    one. At a short length several keep the same, and what the others would lose is not known."""
    kept, smallest = [], 0.0
    for candidate in reversed(found):
        if not candidate.size.whole and candidate.size.ratio > _APART * smallest:
            kept.append(candidate)
        smallest = max(smallest, candidate.size.ratio)
    return kept


def allocate(
    loaded: LoadedModel,
    base: CompressionConfig,
    layers: int,
    bits: float,
    corpus: Corpus,
    advance: Advance,
) -> Allocation:
    """Bits for each layer and side whose mean is at most `bits`.

    Args:
        base: everything else; its own bits are not used.
        layers: compressed layers of the model.
        bits: per element of the codes, from 2 to 8.

    Raises:
        UsageError: the bits are out of range.
    """
    if not min(BITS) <= bits <= max(BITS):
        raise UsageError(f"--bits {bits:g} is out of range; use {min(BITS)} to {max(BITS)}.")
    plain = replace(base, policy=KeepAll(), layer_bits=())
    levels = sorted(BITS)
    top = np.full((layers, 2), levels[-1])
    arms: dict[str, Arm] = {}
    for layer in range(layers):
        for side in range(2):
            for level in levels[:-1]:
                lowered = top.copy()
                lowered[layer, side] = level
                arms[f"{layer}{'kv'[side]}{level}"] = _arm(plain, lowered)
    measured = _klds(loaded, list(arms.values()), corpus, advance)
    cost = np.zeros((layers, 2, len(levels)))
    for layer in range(layers):
        for side in range(2):
            for i, level in enumerate(levels[:-1]):
                cost[layer, side, i] = measured[arms[f"{layer}{'kv'[side]}{level}"].kv]
    chosen = np.array(levels)[_greedy(cost, levels, bits)]
    uniform = _uniform(bits)
    ours, theirs = _arm(plain, chosen), _arm(plain, np.tile(uniform, (layers, 1)))
    final = _klds(loaded, [ours, theirs], corpus, advance)
    pairs = tuple((int(k), int(v)) for k, v in chosen)
    return Allocation(pairs, final[ours.kv], (uniform, final[theirs.kv]))


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
