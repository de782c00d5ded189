"""Learning which key channels a model can do without (LeanK, arXiv 2508.02215, section 3).

Every channel has a gate, a number from 0 to 1, and every head has one for its tokens between sink
tokens and window (`gates`). In the first part all are open and may close by any amount: what the
model says should stay what it was, and what is left open has a price. A head's gate times those of
its channels is what they are worth. In the second part gates are drawn, step by step, to where the
cache will have them: the groups worth most are open, all others shut. Gradients go to the gates as
if they had been what was used (straight-through), so that what turns out to be needed comes back.

What differs from the paper: the loss is the divergence of what the model says (Kullback-Leibler)
instead of the distance of its last hidden states; what is left out counts as the center of its
channel, as in the cache, and not as 0; heads have gates, because whether a head needs its tokens
shows in no single channel; the second part goes over step by step; and half of the lessons go on
with text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from leankv_mlx.cache.masks import Masks
from leankv_mlx.errors import UsageError
from leankv_mlx.learning.checkpoint import Checkpoint
from leankv_mlx.learning.gates import Gates, logits
from leankv_mlx.learning.lessons import Lesson, Lessons

METHOD = 4
"""To be raised with every change of what is learned: a state of another one is not gone on from."""
EVERY = 20
"""Steps between two states that are kept, and between two exams."""

_BETAS = [0.9, 0.99]
_DRAWN = 0.7
"""Share of the second part after which gates are where the cache has them."""
_RAMP = 0.2
"""Share of the steps in which the rate rises, and falls at the end (LeanK)."""


@dataclass(frozen=True)
class Course:
    """How to learn.

    Attributes:
        ratio: share of the groups of channels that is left out.
        steps: of both parts together.
        rate: by how much a gate moves in a step, about; a third of it in the second part.
        price: what open gates cost, in nats if all are open.

    Raises:
        UsageError: a value is out of range.
    """

    ratio: float
    steps: int = 200
    rate: float = 0.03
    price: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"--ratio {self.ratio:g} is out of range; use 0.1 to 0.9.")
        if self.steps < 2:
            raise UsageError(f"--steps {self.steps} is too small; use some hundred.")

    @property
    def first(self) -> int:
        """Steps of the first part, which are more: what is worth what is found there."""
        return self.steps * 3 // 5

    def rate_of(self, step: int) -> float:
        """A trapezoid in each part (LeanK)."""
        begin, length, rate = (
            (0, self.first, self.rate)
            if step < self.first
            else (self.first, self.steps - self.first, self.rate / 3)
        )
        at, ramp = step - begin, _RAMP * length
        return rate * min(1.0, (at + 1) / ramp, (length - at) / ramp)

    def drawn(self, step: int) -> float:
        """How far gates are drawn to where the cache has them, 0 to 1."""
        begun = max(0, step - self.first)
        return min(1.0, begun / (_DRAWN * (self.steps - self.first)))


Look = Callable[[int, float], None]
"""Gets the steps that are done and the divergence of the last lessons, a running mean in nats."""


Params = dict[str, mx.array]
"""Gates that are learned: "channels" and "heads", as in `Gates`."""


@dataclass
class _State:
    """After some steps.

    Attributes:
        loss: running mean.
        best: what channels were worth when the exam went best, float32 [layers, H, head_dim].
        least: divergence of that exam, inf before the first.
    """

    params: Params
    step: int = 0
    loss: float = 0.0
    best: mx.array | None = None
    least: float = math.inf
    optimizer: optim.Adam = field(
        default_factory=lambda: optim.Adam(0.0, betas=_BETAS, bias_correction=True)
    )

    @property
    def worth(self) -> NDArray[np.float32]:
        """Of each channel, [layers, H, head_dim]."""
        worth: NDArray[np.float32] = np.array(
            self.params["channels"] * self.params["heads"][..., None]
        )
        return worth

    def tensors(self) -> dict[str, mx.array]:
        """For a checkpoint."""
        self.optimizer.init(self.params)
        tree = {"params": self.params, "moments": {n: self.optimizer.state[n] for n in self.params}}
        flat: Any = tree_flatten(tree)
        moves = self.optimizer.step.astype(mx.int64)
        tensors = {**dict(flat), "loss": mx.array(self.loss), "moves": moves}
        if self.best is not None:
            tensors |= {"best": self.best, "least": mx.array(self.least)}
        return tensors

    def restore(self, step: int, tensors: dict[str, mx.array]) -> None:
        """Become what `tensors` were of."""
        self.step, self.loss = step, float(tensors.pop("loss"))
        moves = tensors.pop("moves").astype(mx.uint64)
        if "best" in tensors:
            self.best, self.least = tensors.pop("best"), float(tensors.pop("least"))
        tree: Any = tree_unflatten(list(tensors.items()))
        self.params = tree["params"]
        self.optimizer.init(self.params)
        self.optimizer.state.update({**tree["moments"], "step": moves})


def learn(
    model: nn.Module,
    lessons: Lessons,
    course: Course,
    seed: int,
    checkpoint: Checkpoint,
    look: Look,
) -> Masks:
    """Learn a mask from lessons; a course that was begun goes on. To be used while `asking`.

    The same seed, lessons and course give the same mask, on one machine.

    Args:
        seed: of the order of the lessons.
    """
    rows = list(lessons.answers[0].beginning.rows.values())
    layers, (heads, _, dim) = len(rows), rows[0].k.shape
    state = _State({"channels": mx.ones((layers, heads, dim)), "heads": mx.ones((layers, heads))})
    if (kept := checkpoint.load()) is not None:
        state.restore(*kept)
    while state.step < course.steps:
        used = _used(state, course)
        found = [_gradient(model, lesson, used) for lesson in lessons.draw(seed, state.step)]
        _move(state, course, [gradient for _, gradient in found])
        mean = sum(loss for loss, _ in found) / len(found)
        state.loss = mean if state.step == 0 else 0.95 * state.loss + 0.05 * mean
        state.step += 1
        ended = state.step == course.steps
        if ended or (state.step >= course.first and (state.step - course.first) % EVERY == 0):
            _examine(model, lessons, course, state)
        if ended or state.step % EVERY == 0:
            checkpoint.save(state.step, state.tensors())
        look(state.step, state.loss)
    return Masks.of(state.worth if state.best is None else np.array(state.best), course.ratio)


def divergence(model: nn.Module, lesson: Lesson, gates: Gates) -> mx.array:
    """Of what the model says through gates from what it said without, in nats for each token; over
    the tokens that are likely."""
    said = nn.log_softmax(logits(model, lesson.beginning, lesson.tokens, gates), axis=-1)
    said = mx.take_along_axis(said[lesson.first :], lesson.likely, axis=-1)
    wanted = mx.log(mx.maximum(lesson.shares, 1e-30))
    return (lesson.shares * (wanted - said)).sum(axis=-1).mean()


def gates_of(masks: Masks) -> Gates:
    """What the cache does with a mask."""
    held = masks.groups > 0
    return Gates(mx.array(masks.kept.astype(np.float32)), mx.array(held.astype(np.float32)))


def _examine(model: nn.Module, lessons: Lessons, course: Course, state: _State) -> None:
    """Keep what channels are worth if the mask that it makes is the best one so far."""
    if not (exam := lessons.exam):
        return
    gates, total = gates_of(Masks.of(state.worth, course.ratio)), 0.0
    for lesson in exam:
        total += float(divergence(model, lesson, gates))
        mx.clear_cache()
    if total / len(exam) < state.least:
        state.best, state.least = mx.array(state.worth), total / len(exam)


def _used(state: _State, course: Course) -> Params:
    """What a step computes with: the gates, drawn to where the cache has them."""
    channels, heads = state.params["channels"], state.params["heads"]
    drawn = course.drawn(state.step)
    if drawn == 0:
        return dict(state.params)
    there = gates_of(Masks.of(state.worth, course.ratio))
    # Channels of a head that holds nothing matter to nothing but its way back.
    to = mx.where(there.heads[..., None] > 0, there.channels, channels)
    return {
        "channels": channels + drawn * (to - channels),
        "heads": heads + drawn * (there.heads - heads),
    }


def _gradient(model: nn.Module, lesson: Lesson, used: Params) -> tuple[float, Params]:
    """The divergence of a lesson, and by how much it changes with the gates."""

    def loss(params: Params) -> mx.array:
        return divergence(model, lesson, Gates(params["channels"], params["heads"]))

    value, gradient = mx.value_and_grad(loss)(used)
    mx.eval(value, gradient)
    mx.clear_cache()
    return float(value), gradient


def _move(state: _State, course: Course, gradients: Sequence[Params]) -> None:
    total = {name: sum(each[name] for each in gradients) for name in state.params}
    if state.step < course.first:
        price = mx.grad(lambda p: course.price * (p["channels"] * p["heads"][..., None]).mean())
        total = {name: total[name] + x for name, x in price(state.params).items()}
    elif state.step == course.first:
        state.optimizer = _State(state.params).optimizer
    state.optimizer.learning_rate = course.rate_of(state.step)
    moved = state.optimizer.apply_gradients(total, state.params)
    state.params = {name: mx.clip(x, 0, 1) for name, x in moved.items()}
    mx.eval(state.params, state.optimizer.state)
