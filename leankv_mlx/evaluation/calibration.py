"""Calibration: the smallest cache that stays within limits, found by measuring.

`sweep` measures candidates of a policy through the real cache, from small to large; the smallest
that is close enough to the uncompressed model is taken. Bits of layers are `allocation`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from leankv_mlx.config import UNCOMPRESSED, CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.arms import Arm, Size
from leankv_mlx.evaluation.fidelity import Corpus, run_fidelity
from leankv_mlx.evaluation.retrieval import Cell, run_retrieval
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.policies import Budget, Policy, Threshold

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
