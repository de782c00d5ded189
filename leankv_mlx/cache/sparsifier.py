"""Drops and demotes tokens of the compressed layers of a model, all of them together.

Each layer's cache knows its `Sparsifier`. The first layer of a step acts for all: then every layer
holds the same tokens, and one plan, and one wait for its scores, serves them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError
from leankv_mlx.kernels import MAX_DECODE_TOKENS
from leankv_mlx.sparsity import LayerSlots, policy_of, pooled

if TYPE_CHECKING:
    from leankv_mlx.cache.layer import Layer

REFRESH_TOKENS = 512
"""Generated tokens after which stored scores are made anew."""

Scores = NDArray[np.float32]


class Sparsifier:
    """One for each list of caches.

    Args:
        config: the settings of the caches.
    """

    def __init__(self, config: CompressionConfig) -> None:
        self._config = config
        self._policy = policy_of(config)
        self._members: list[weakref.ref[Layer]] = []
        self._last_update = 0  # tokens of the update before
        self._ended = False  # whether the prompt is in
        self._judged_at = 0  # offset at which the stored scores were made

    def join(self, layer: Layer) -> None:
        """Act for one more layer; they join in the order in which the model runs them.

        Raises:
            ConfigError: policy=budget with less than what is never dropped.
        """
        self._members.append(weakref.ref(layer))
        if layer.offset == 0:  # copies and files of what was begun are not refused
            self._check_budget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        """For copies of the layers, which have to join."""
        copy = Sparsifier(self._config)
        copy._last_update, copy._ended = self._last_update, self._ended
        copy._judged_at = self._judged_at
        memo[id(self)] = copy
        return copy

    def before_update(self, layer: Layer, tokens: int) -> None:
        """To be called for every layer before it takes `tokens` more. For up to 8 of them the
        window makes room first."""
        decode = tokens <= MAX_DECODE_TOKENS
        if self._leads(layer):
            # The last token of a prompt comes alone, or with drafts; so do generated ones.
            if decode and tokens == self._last_update and not self._ended:
                self.end_prompt()
            elif not decode:
                self._ended = False
                if self._config.at == "chunk":
                    self._place(*self._judged(self._alive()))
            self._last_update = tokens
        if decode and _leaves(layer):
            self._flush(layer)

    def end_prompt(self) -> None:
        """The whole prompt is in: judge all stored tokens by its last queries, and place them.

        Raises:
            ConfigError: policy=budget with less than what is never dropped, now that it is known
                what the observed queries take.
        """
        self._check_budget()
        self._ended = True
        layers = self._alive()
        for layer in layers:
            layer.compress()
        judged = self._judged(layers) if self._config.scores == "queries" else None
        self._clear_queries()  # what is generated will be judged by what comes after it
        if judged:
            self._place(*judged)

    def forget_queries(self) -> None:
        """Another prompt begins: what came before says neither what is needed nor where it ends."""
        self._last_update, self._ended, self._judged_at = 0, False, 0
        self._clear_queries()

    def place_by(self, scores: Sequence[Scores]) -> None:
        """Place the stored tokens by given scores.

        Args:
            scores: significance [H, S] of each layer that has a body, before pooling.
        """
        layers = [layer for layer in self._alive() if layer.body]
        smooth = [
            pooled(score, body.describe().positions, self._config.pooling)
            for layer, score in zip(layers, scores, strict=True)
            if (body := layer.body)
        ]
        self._place(layers, smooth)

    def _flush(self, layer: Layer) -> None:
        """Tokens leave the window of a layer: of all layers, if it is the first."""
        layers = [layer]
        if self._leads(layer):
            layers = [x for x in self._alive() if x.offset == layer.offset and _leaves(x)]
        if not self._ended or self._config.scores == "repeat":
            for each in layers:
                each.compress()
            return
        lazy = [each.judge_window() for each in layers]
        mx.eval([x for x in lazy if x is not None])
        for each, scores in zip(layers, lazy, strict=True):
            each.compress(None if scores is None else self._of_leaving(each, np.array(scores)))
        if layer.offset - self._judged_at >= REFRESH_TOKENS:
            self._place(*self._judged(layers))
        else:
            self._place([x for x in layers if x.observed], None)

    def _judged(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[Scores]]:
        """Those of the layers that can be judged, and the pooled scores of all their slots."""
        able = [layer for layer in layers if layer.body and layer.observed]
        lazy = [layer.judge() for layer in able]
        mx.eval(lazy)
        scores = []
        for layer, (stored, exact) in zip(able, lazy, strict=True):
            assert layer.body is not None
            positions = layer.body.describe().positions
            around = np.broadcast_to(layer.exact_positions, exact.shape)
            smooth = pooled(
                np.concatenate([np.array(stored), np.array(exact)], axis=1),
                np.concatenate([positions, around], axis=1),
                self._config.pooling,
            )
            scores.append(smooth[:, : positions.shape[1]])
            self._judged_at = layer.offset
        return able, scores

    def _place(self, layers: Sequence[Layer], scores: Sequence[Scores] | None) -> None:
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
                    layer.growth_nbytes,
                    layer.fp16_nbytes,
                    layer.offset,
                )
            )
        plans = self._policy.plan(described) if described else []
        for i, (body, plan) in enumerate(zip(bodies, plans, strict=True)):
            assert body is not None
            body.place(plan, scores[i] if scores else None)
        if self._over_budget():  # with blocks that pools hold in reserve
            for body in bodies:
                assert body is not None
                body.compact()

    def _over_budget(self) -> bool:
        budget = self._config.budget if self._config.policy == "budget" else 0
        return budget > 0 and sum(x.most_nbytes for x in self._alive()) > budget

    def _of_leaving(self, layer: Layer, scores: Scores) -> Scores:
        """Of the scores of the exact rows those of the rows that leave."""
        around = np.broadcast_to(layer.exact_positions, scores.shape)
        start, stop = layer.leaving
        return pooled(scores, around, self._config.pooling)[:, start:stop]

    def _clear_queries(self) -> None:
        for layer in self._alive():
            if layer.observations:
                layer.observations.clear()

    def _check_budget(self) -> None:
        budget, layers = self._config.budget, self._alive()
        fixed = sum(layer.fixed_nbytes + layer.growth_nbytes for layer in layers)
        if self._config.policy == "budget" and 0 < budget < fixed:
            raise ConfigError(
                f"budget={budget} bytes is too small: sink tokens, window and observed queries of "
                f"{len(layers)} layers alone take {fixed}; use a larger budget, or a smaller "
                "window."
            )

    def _alive(self) -> list[Layer]:
        return [layer for ref in self._members if (layer := ref()) is not None]

    def _leads(self, layer: Layer) -> bool:
        """Whether it is the first that is alive."""
        first = next((x for ref in self._members if (x := ref()) is not None), None)
        return first is layer


def _leaves(layer: Layer) -> bool:
    start, stop = layer.leaving
    return stop > start
