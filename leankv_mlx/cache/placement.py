"""Where the stored tokens of a sequence go: judged by a scorer, placed as a policy plans, and kept
to a limit in bytes; always for several layers at once, with one wait for all their scores."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.cache.judging import judge, judge_window
from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.phase import Phase
from leankv_mlx.errors import ConfigError
from leankv_mlx.policies import LayerSlots, Policy
from leankv_mlx.scorers import Scorer

REFRESH_TOKENS = 512
"""Generated tokens after which stored scores are made anew."""

Scores = NDArray[np.float32]


class Placement:
    """A policy and a scorer at work on the layers of one sequence.

    Attributes:
        layers: of the sequence, which adds to them.
        judged_at: tokens that had come when the stored scores were made.
    """

    def __init__(self, policy: Policy, scorer: Scorer, layers: list[Layer], phase: Phase) -> None:
        self.layers = layers
        self.judged_at = 0
        self._policy = policy
        self._scorer = scorer
        self._phase = phase  # for the size of a step

    # Judging and placing.

    def judge_and_place(self) -> None:
        """Judge all stored tokens by the last queries, and place them."""
        self.place(*self.judged(self.layers))

    def place_leaving(self, layers: Sequence[Layer]) -> None:
        """Of these layers tokens leave the window: score those by what the queries saw when they
        came, and place them with the others; now and then judge all of them anew."""
        lazy = [judge_window(layer) for layer in layers]
        mx.eval([scores for scores in lazy if scores is not None])
        blind = False  # long steps leave no log-sum-exps
        for layer, scores in zip(layers, lazy, strict=True):
            layer.compress(None if scores is None else self._of_leaving(layer, np.array(scores)))
            blind |= scores is None and layer.observed
        if blind or layers[0].offset - self.judged_at >= REFRESH_TOKENS:
            self.place(*self.judged(layers))
        else:
            self.place([layer for layer in layers if layer.observed], None)

    def place_by(self, layers: Sequence[Layer], scores: Sequence[Scores]) -> None:
        """Place the stored tokens of these layers by the attention that they received, [H, S]."""
        smooth = [
            self._scorer.judge(score, body.describe().positions)
            for layer, score in zip(layers, scores, strict=True)
            if (body := layer.body)
        ]
        self.place(layers, smooth)

    def judged(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[Scores]]:
        """Those of the layers that can be judged, and the scores of all their slots."""
        able = [layer for layer in layers if layer.body and layer.observed]
        lazy = [judge(layer) for layer in able]
        mx.eval(lazy)
        scores = []
        for layer, (stored, exact) in zip(able, lazy, strict=True):
            assert layer.body is not None
            positions = layer.body.describe().positions
            around = np.broadcast_to(layer.exact_positions, exact.shape)
            smooth = self._scorer.judge(
                np.concatenate([np.array(stored), np.array(exact)], axis=1),
                np.concatenate([positions, around], axis=1),
            )
            scores.append(smooth[:, : positions.shape[1]])
            self.judged_at = layer.offset
        return able, scores

    def place(self, layers: Sequence[Layer], scores: Sequence[Scores] | None) -> None:
        """Plan for all these layers, and move their slots; without scores by the stored ones."""
        bodies = [layer.body for layer in layers]
        described = []
        for i, (layer, body) in enumerate(zip(layers, bodies, strict=True)):
            assert body is not None
            slots = body.describe()
            described.append(
                LayerSlots(
                    scores[i] if scores else slots.scores,
                    slots.tiers,
                    body.slot_nbytes(layer.offset),
                    layer.fixed_nbytes,
                    layer.growth_nbytes + self._step_nbytes(layer),
                    layer.fp16_nbytes,
                    layer.offset,
                )
            )
        plans = self._policy.plan(described) if described else []
        for i, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
            body = bodies[i]
            assert body is not None
            if (plan != described[i].tiers).any():
                layer.placed = layer.offset
            body.place(plan, scores[i] if scores else None)
        if self._over_limit():
            self._compact()

    def _of_leaving(self, layer: Layer, scores: Scores) -> Scores:
        """Of the scores of the exact rows those of the rows that leave."""
        around = np.broadcast_to(layer.exact_positions, scores.shape)
        start, stop = layer.leaving
        return self._scorer.judge(scores, around)[:, start:stop]

    # Keeping to a limit in bytes.

    def check_limit(self, layers: Sequence[Layer]) -> None:
        """Refuse a limit below what these layers never drop.

        Raises:
            ConfigError: policy=budget with fewer bytes than that.
        """
        budget, fixed = self._policy.limit, sum(layer.least_nbytes for layer in layers)
        if 0 < budget < fixed:
            raise ConfigError(
                f"budget={budget} bytes is too small: sink tokens, window and observed queries of "
                f"{len(layers)} layers alone take {fixed}; use a larger budget, or a smaller "
                "window."
            )

    def keep_to_limit(self) -> None:
        """Drop what the bytes do not hold.

        Raises:
            ConfigError: what may be dropped is not enough.
        """
        if not self.shrink():
            self.check_limit(self.layers)
            raise ConfigError(
                f"budget={self._policy.limit} bytes does not hold this cache: "
                f"{self._most_nbytes} are needed with all dropped that may be; use a larger "
                "budget, or a smaller window."
            )

    def shrink(self) -> bool:
        """Drop what the bytes do not hold; whether that was possible."""
        if self._over_limit():
            self._compact()
        if self._over_limit():
            self.judge_and_place()
        return not self._over_limit()

    def _over_limit(self) -> bool:
        return 0 < self._policy.limit < self._most_nbytes

    @property
    def _most_nbytes(self) -> int:
        """Bytes allocated before anything is dropped again."""
        return sum(x.most_nbytes + self._step_nbytes(x) for x in self.layers)

    def _step_nbytes(self, layer: Layer) -> int:
        """Bytes by which a step may overfill the window."""
        return (self._phase.step - 1) * layer.row_nbytes

    def _compact(self) -> None:
        """Give back the blocks that pools hold in reserve."""
        for layer in self.layers:
            if layer.body:
                layer.body.compact()
