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
from leankv_mlx.policies import LayerSlots
from leankv_mlx.sparsity.observations import OBSERVED_QUERIES

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
        self._members: list[weakref.ref[Layer]] = []
        self._ended = False  # whether the prompt is in
        self._judged_at = 0  # offset at which the stored scores were made
        # Where the prompt ends: told by the caller, or guessed from the sizes of the updates.
        self._to_come: float | None = None  # tokens of the prompt; None if nobody tells
        self._step = MAX_DECODE_TOKENS  # the most that are generated at a time
        self._last_update = 0  # tokens of the update before
        self._few = 0  # tokens of the updates of up to 8 in a row
        # Of the update on its way.
        self._waits = False  # whether its tokens stay in the window until the next one
        self._bound = True  # whether the byte budget holds for it

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
        for name, value in vars(self).items():
            if name != "_members":
                setattr(copy, name, value)
        memo[id(self)] = copy
        return copy

    def begin_prompt(self, tokens: float, step: int) -> None:
        """So many tokens of a prompt come next, and then up to `step` generated ones at a time."""
        self._to_come, self._step = tokens, max(step, MAX_DECODE_TOKENS)
        self._ended, self._last_update, self._few = False, 0, 0

    def leave_prompt(self) -> None:
        """Nobody tells any more: from here on updates speak for themselves."""
        self._to_come, self._step = None, MAX_DECODE_TOKENS

    def rewound(self) -> None:
        """Drafts were verified: the prompt is in, and what came last was a generated step."""
        self._to_come = 0 if self._to_come is None else min(self._to_come, 0)
        self._step = max(self._step, self._last_update)

    def before_update(self, layer: Layer, tokens: int) -> bool:
        """To be called for every layer before it takes `tokens` more. For a step of generated
        tokens a full window makes room first; it is returned whether this is one, and otherwise
        the layer is to be compressed once they were attended to.

        Raises:
            ConfigError: policy=budget with bytes that cannot be kept to.
        """
        if self._leads(layer):
            self._begin(tokens)
        if self._waits and _leaves(layer):
            self._flush(layer)
        return self._waits

    def _begin(self, tokens: int) -> None:
        """What kind of update this is, for all layers; and what it says of the one before."""
        reading = self._to_come is not None and self._to_come > 0
        after_long = self._last_update > MAX_DECODE_TOKENS
        self._bound = not reading
        self._waits = tokens <= (MAX_DECODE_TOKENS if reading else self._step)
        self._few = self._few + tokens if tokens <= MAX_DECODE_TOKENS else 0
        # The last token of a prompt comes alone, or with drafts; so do generated ones.
        follows = tokens == self._last_update or self._few > OBSERVED_QUERIES
        self._last_update = tokens
        if self._to_come is not None and reading:
            self._to_come -= tokens
        elif self._waits:
            if not self._ended and (self._to_come is not None or follows):
                self.end_prompt()
        elif self._to_come is not None:
            self.leave_prompt()  # too many for a step: another prompt, of which nobody told
        if not self._waits:
            self._ended = False
            if self._config.at == "chunk":
                self._place(*self._judged(self._alive()))
        if self._bound and after_long and tokens > MAX_DECODE_TOKENS:
            self._keep_to_budget()

    def after_attention(self, layer: Layer) -> None:
        """To be called when a layer has attended to more than 8 tokens that came at once."""
        if self._bound and layer is self._alive()[-1]:
            self._shrink()  # what is impossible is told before the next step

    def end_prompt(self) -> None:
        """The whole prompt is in: judge all stored tokens by its last queries, and place them.

        Raises:
            ConfigError: policy=budget with less than what is never dropped, now that it is known
                what the observed queries take.
        """
        self._check_budget()
        self._ended = True
        if self._to_come is not None:
            self._to_come = 0
        layers = self._alive()
        for layer in layers:
            layer.compress()
        judged = None if self._config.scorer.repeats else self._judged(layers)
        if judged is None:
            self._keep_to_budget()  # while there are queries to judge by
        self._clear_queries()  # what is generated will be judged by what comes after it
        if judged:
            self._place(*judged)
        self._keep_to_budget()

    def forget_queries(self) -> None:
        """Another prompt begins: what came before says neither what is needed nor where it ends."""
        self._last_update, self._few, self._ended, self._judged_at = 0, 0, False, 0
        self._clear_queries()

    def place_by(self, scores: Sequence[Scores]) -> None:
        """Place the stored tokens by given scores.

        Args:
            scores: attention received, [H, S], of each layer that has a body.
        """
        layers = [layer for layer in self._alive() if layer.body]
        smooth = [
            self._config.scorer.judge(score, body.describe().positions)
            for layer, score in zip(layers, scores, strict=True)
            if (body := layer.body)
        ]
        self._place(layers, smooth)

    def _flush(self, layer: Layer) -> None:
        """Tokens leave the window of a layer: of all layers, if it is the first."""
        layers = [layer]
        if self._leads(layer):
            layers = [x for x in self._alive() if x.offset == layer.offset and _leaves(x)]
        by_queries = not self._config.scorer.repeats
        if self._ended and by_queries:
            self._judge_and_place(layers)
        else:
            for each in layers:
                each.compress()
            # Chunks of a prompt so small that they wait in the window.
            small = not self._ended and by_queries
            if small and self._config.at == "chunk" and self._leads(layer):
                self._place(*self._judged(self._alive()))
        if self._bound:
            self._keep_to_budget()

    def _judge_and_place(self, layers: Sequence[Layer]) -> None:
        """A flush once the prompt is in."""
        lazy = [each.judge_window() for each in layers]
        mx.eval([x for x in lazy if x is not None])
        blind = False  # long steps leave no log-sum-exps
        for each, scores in zip(layers, lazy, strict=True):
            each.compress(None if scores is None else self._of_leaving(each, np.array(scores)))
            blind |= scores is None and each.observed
        if blind or layers[0].offset - self._judged_at >= REFRESH_TOKENS:
            self._place(*self._judged(layers))
        else:
            self._place([x for x in layers if x.observed], None)

    def _judged(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[Scores]]:
        """Those of the layers that can be judged, and the scores of all their slots."""
        able = [layer for layer in layers if layer.body and layer.observed]
        lazy = [layer.judge() for layer in able]
        mx.eval(lazy)
        scores = []
        for layer, (stored, exact) in zip(able, lazy, strict=True):
            assert layer.body is not None
            positions = layer.body.describe().positions
            around = np.broadcast_to(layer.exact_positions, exact.shape)
            smooth = self._config.scorer.judge(
                np.concatenate([np.array(stored), np.array(exact)], axis=1),
                np.concatenate([positions, around], axis=1),
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
                    layer.growth_nbytes + self._step_nbytes(layer),
                    layer.fp16_nbytes,
                    layer.offset,
                )
            )
        plans = self._config.policy.plan(described) if described else []
        for i, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
            body = bodies[i]
            assert body is not None
            if (plan != described[i].tiers).any():
                layer.placed = layer.offset
            body.place(plan, scores[i] if scores else None)
        if self._over_budget():
            self._compact()

    def _shrink(self) -> bool:
        """Drop what the bytes do not hold; whether that was possible."""
        if self._over_budget():
            self._compact()
        if self._over_budget():
            self._place(*self._judged(self._alive()))
        return not self._over_budget()

    def _keep_to_budget(self) -> None:
        """Drop what the bytes do not hold.

        Raises:
            ConfigError: what may be dropped is not enough.
        """
        if not self._shrink():
            self._check_budget()
            raise ConfigError(
                f"budget={self._config.policy.limit} bytes does not hold this cache: "
                f"{self._most_nbytes} are needed with all dropped that may be; use a larger "
                "budget, or a smaller window."
            )

    def _compact(self) -> None:
        """Give back the blocks that pools hold in reserve."""
        for layer in self._alive():
            if layer.body:
                layer.body.compact()

    def _over_budget(self) -> bool:
        return 0 < self._config.policy.limit < self._most_nbytes

    @property
    def _most_nbytes(self) -> int:
        """Bytes allocated before anything is dropped again."""
        return sum(x.most_nbytes + self._step_nbytes(x) for x in self._alive())

    def _step_nbytes(self, layer: Layer) -> int:
        """Bytes by which a step may overfill the window."""
        return (self._step - 1) * layer.row_nbytes

    def _of_leaving(self, layer: Layer, scores: Scores) -> Scores:
        """Of the scores of the exact rows those of the rows that leave."""
        around = np.broadcast_to(layer.exact_positions, scores.shape)
        start, stop = layer.leaving
        return self._config.scorer.judge(scores, around)[:, start:stop]

    def _clear_queries(self) -> None:
        for layer in self._alive():
            if layer.observations:
                layer.observations.clear()

    def _check_budget(self) -> None:
        budget, layers = self._config.policy.limit, self._alive()
        fixed = sum(layer.least_nbytes for layer in layers)
        if 0 < budget < fixed:
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
