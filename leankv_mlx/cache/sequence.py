"""`Sequence`: one sequence of a model, all its layers together."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.phase import Phase
from leankv_mlx.cache.placement import Placement
from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.policies import Policy
from leankv_mlx.scorers import Scorer


@dataclass(frozen=True)
class _Fork:
    """A copy of a sequence on its way, and the caches whose copies are layers of it."""

    made: weakref.ref[Sequence]
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


class Sequence:
    """One sequence of a model: its layers, where it stands, and what drops its tokens.

    The caches that mlx-lm sees are views, each on one of the layers. The first layer of a step acts
    for all: then every layer holds the same tokens, and one plan, and one wait for its scores,
    serves them all.

    Attributes:
        policy: which stored tokens stay.
        scorer: what they are judged by.
        layers: in the order in which the model runs them; a layer comes with its first tokens.
        settles: whether something goes when the prompt is in: tokens, by the policy, or key
            channels of a layer, by a mask.
        phase: whether the prompt is in. It is followed only where something goes then; nothing else
            asks.
    """

    def __init__(self, policy: Policy, scorer: Scorer, phase: Phase | None = None) -> None:
        self.policy = policy
        self.scorer = scorer
        self.layers: list[Layer] = []
        self.settles = policy.drops
        self.phase = phase or Phase()
        self._placement = Placement(policy, scorer, self.layers, self.phase)
        self._forks: dict[int, _Fork] = {}

    @property
    def offset(self) -> int:
        """Tokens that have come to all layers."""
        return min((layer.offset for layer in self.layers), default=0)

    @property
    def stored(self) -> list[Layer]:
        """Those of its layers that have stored tokens."""
        return [layer for layer in self.layers if layer.body]

    # Its layers.

    def join(self, layer: Layer) -> None:
        """Take one more layer.

        Raises:
            ConfigError: policy=budget with less than what is never dropped.
        """
        if layer.offset == 0:  # copies and files of what was begun are not refused
            self._placement.check_limit([*self.layers, layer])
        self.layers.append(layer)
        self.settles |= layer.space.channels is not None

    def leave(self, layer: Layer) -> None:
        """Let go of a layer, which goes on in another sequence or ends."""
        self.layers.remove(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequence:
        """Where it stands, for copies of its layers, which have to join: a copy of some of the
        caches of a model is a sequence of those layers alone."""
        other = Sequence(self.policy, self.scorer, copy(self.phase))
        other._placement.judged_at = self._placement.judged_at
        memo[id(self)] = other
        return other

    def fork(self, cache: Any, which: int = 0) -> Sequence:
        """Where a copy of one of its caches belongs, if they are copied one by one, as mlx-lm does
        in and out of batches: with those that were copied since this one last was.

        Args:
            which: of several copies that each cache gets at once.
        """
        fork = self._forks.get(which)
        made = fork.made() if fork else None
        if fork is None or made is None or cache in fork.caches:
            made = deepcopy(self)
            fork = self._forks[which] = _Fork(weakref.ref(made))
        fork.caches.add(cache)
        return made

    # What callers know.

    @contextmanager
    def reading(self, tokens: float = math.inf, step: int = 1) -> Iterator[None]:
        """Inside of the block the model reads a prompt, and may then generate.

        The prompt stays whole until it is in, whatever the sizes of the calls. Where nobody says
        so, that is guessed (see `Phase`), and a limit in bytes holds before it, too.

        Args:
            tokens: of the prompt that are still to come; infinite if it does not end inside.
            step: the most tokens that are then generated in a call.
        """
        self.phase.begin_prompt(tokens, step)
        try:
            yield
        finally:
            self.phase.leave_prompt()

    def last_of_prompt(self) -> None:
        """The next update is the last token of a prompt; generated ones come one by one then."""
        self.phase.begin_prompt(1, 1)

    def end_prompt(self) -> None:
        """The whole prompt is in: narrow all layers, judge all stored tokens by its last queries,
        and place them. Tokens are judged by what is left of them, as what is generated will see
        them, and what is narrowed leaves a budget more of them.

        Raises:
            ConfigError: policy=budget with less than what is never dropped, now that it is known
                what the observed queries take.
        """
        if not self.settles:
            return
        placement = self._placement
        placement.check_limit(self.layers)
        self.phase.end_prompt()
        for layer in self.layers:
            layer.compress()
        self.narrow()
        if not self.policy.drops:
            return
        judged = None if self.scorer.repeats else placement.judged(self.layers)
        if judged is None:
            placement.keep_to_limit()  # while there are queries to judge by
        self._clear_queries()  # what is generated will be judged by what comes after it
        if judged:
            placement.place(*judged)
        placement.keep_to_limit()

    def narrow(self) -> None:
        """Codes keep only what a mask says from now on, see `Layer.narrow`; nothing without one."""
        for layer in self.layers:
            layer.narrow()

    def forget_queries(self) -> None:
        """Another prompt begins: let stored tokens be judged by what comes next alone, as if they
        came from a file."""
        self.phase.forget()
        self._placement.judged_at = 0
        self._clear_queries()

    def place_by(self, scores: Iterable[mx.array]) -> None:
        """Let the policy place all stored tokens by given scores.

        Args:
            scores: attention received, float32 [H, S], of each of the `stored` layers.
        """
        if self.policy.drops:
            self._placement.place_by(self.stored, [np.array(score) for score in scores])

    def is_prefix(self, tokens: int) -> bool:
        """Whether the first `tokens` tokens are what they would be if no others had come.

        After a prompt of which something goes they are that only with all of it: tokens that a
        policy dropped for one prompt would be missing in another, and a mask would act within it.
        """
        return all(tokens >= layer.settled for layer in self.layers)

    def verified(self, rejected: int) -> None:
        """Drafts were verified: the prompt is in, and the last `rejected` tokens go. Its caches are
        to be trimmed by them.

        Raises:
            DroppedTokensError: they reach further back than the window, and a policy has dropped
                tokens there.
        """
        if any(layer.placed and rejected > layer.recent for layer in self.layers):
            raise DroppedTokensError(f"takes back {rejected} tokens")
        self.phase.verified()

    # What its layers tell.

    def before_update(self, layer: Layer, tokens: int) -> bool:
        """To be called for every layer before it takes `tokens` more, where something goes when the
        prompt is in. For a step of generated tokens a full window makes room first; it is returned
        whether this is one, and otherwise the layer is to be compressed once they were attended
        to.

        Raises:
            ConfigError: policy=budget with bytes that cannot be kept to.
        """
        if layer is self.layers[0]:
            self._begin(tokens)
        if self.phase.waits and layer.overfull:
            self.flush(layer)
        return self.phase.waits

    def _begin(self, tokens: int) -> None:
        """An update of all layers; and what it says of the one before."""
        if self.phase.take(tokens):
            self.end_prompt()
        if not self.phase.waits and self.policy.by_chunk:
            self._placement.judge_and_place()
        if self.phase.bound and self.phase.longs > 1:
            self._placement.keep_to_limit()

    def flush(self, layer: Layer) -> None:
        """Tokens leave the window of a layer: of all layers, if it is the first."""
        layers, leads = [layer], layer is self.layers[0]
        if leads:
            layers = [x for x in self.layers if x.offset == layer.offset and x.overfull]
        by_queries = not self.scorer.repeats
        if self.phase.now == "reply" and by_queries and self.policy.drops:
            self._placement.place_leaving(layers)
        else:
            for each in layers:
                each.compress()
            # Chunks of a prompt so small that they wait in the window.
            if leads and self.phase.now == "prompt" and by_queries and self.policy.by_chunk:
                self._placement.judge_and_place()
        if self.phase.bound:
            self._placement.keep_to_limit()

    def after_prefill(self, layer: Layer) -> None:
        """To be called when a layer has attended to more than 8 tokens that came at once, whatever
        the policy."""
        if self.phase.bound and layer in self.layers[-1:]:
            self._placement.shrink()  # what is impossible is told before the next step

    def _clear_queries(self) -> None:
        for layer in self.layers:
            if layer.observations:
                layer.observations.clear()
