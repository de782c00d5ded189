"""Learning which key channels a model can do without (LeanK, arXiv 2508.02215, section 3).

Every channel has a gate, a number from 0 to 1 (`gates`). In the first half all are open and may
close by any amount: what the model says should stay what it was, and each open gate costs a little.
In the second half the best groups of channels are kept and all others left out, as the cache will
do it, and gradients go to the gates as if they had been what was used (straight-through), so that
what turns out to be needed comes back.

What differs from the paper: the loss is the divergence of what the model says (Kullback-Leibler)
instead of the distance of its last hidden states; what is left out counts as the center of its
channel, as in the cache, and not as 0; heads that keep nothing are without their tokens while
learning, too; and half of the lessons go on with text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from leankv_mlx.cache.masks import Masks
from leankv_mlx.errors import UsageError
from leankv_mlx.learning.checkpoint import Checkpoint
from leankv_mlx.learning.gates import Gates, logits
from leankv_mlx.learning.lessons import Lesson, Lessons

EVERY = 20
"""Steps between two states that are kept."""

_BETAS = [0.9, 0.99]
_RAMP = 0.2
"""Share of the steps in which the rate rises, and falls at the end (LeanK)."""


@dataclass(frozen=True)
class Course:
    """How to learn.

    Attributes:
        ratio: share of the groups of channels that is left out.
        steps: of both halves together.
        rate: by how much a gate moves in a step, about; half of it in the second half.
        price: what open gates cost, in nats if all are open.

    Raises:
        UsageError: a value is out of range.
    """

    ratio: float
    steps: int = 600
    rate: float = 0.03
    price: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"--ratio {self.ratio:g} is out of range; use 0.1 to 0.9.")
        if self.steps < 2:
            raise UsageError(f"--steps {self.steps} is too small; use some hundred.")

    @property
    def first(self) -> int:
        """Steps of the first half."""
        return self.steps // 2

    def rate_of(self, step: int) -> float:
        """A trapezoid in each half."""
        half, at = (self.first, step) if step < self.first else (
            self.steps - self.first, step - self.first)  # fmt: skip
        ramp = min(1.0, (at + 1) / (_RAMP * half), (half - at) / (_RAMP * half))
        return self.rate * ramp * (1.0 if step < self.first else 0.5)


Look = Callable[[int, float], None]
"""Gets the steps that are done and the divergence of the last lessons, a running mean in nats."""


@dataclass
class _State:
    """After some steps.

    Attributes:
        alphas: the gates, float32 [layers, H, head_dim].
        loss: running mean.
    """

    alphas: mx.array
    step: int = 0
    loss: float = 0.0
    optimizer: optim.Adam = field(
        default_factory=lambda: optim.Adam(0.0, betas=_BETAS, bias_correction=True)
    )

    def tensors(self) -> dict[str, mx.array]:
        flat: Any = tree_flatten(self.optimizer.state["alphas"])
        kept = {f"optimizer.{name}": x for name, x in flat}
        moves = self.optimizer.step.astype(mx.int64)
        return {"alphas": self.alphas, "loss": mx.array(self.loss), "moves": moves, **kept}

    def restore(self, step: int, tensors: dict[str, mx.array]) -> None:
        self.step, self.loss = step, float(tensors.pop("loss"))
        self.alphas = tensors.pop("alphas")
        self.optimizer.init({"alphas": self.alphas})
        self.optimizer.state["step"] = tensors.pop("moves").astype(mx.uint64)
        kept = [(name.removeprefix("optimizer."), x) for name, x in tensors.items()]
        self.optimizer.state["alphas"] = tree_unflatten(kept)


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
    shape = (len(rows), rows[0].k.shape[0], rows[0].k.shape[2])
    state = _State(mx.ones(shape))
    if (kept := checkpoint.load()) is not None:
        state.restore(*kept)
    while state.step < course.steps:
        pair = lessons.draw(seed, state.step)
        found = [_gradient(model, lesson, _gates(state, course)) for lesson in pair]
        _move(state, course, mx.stack([gradient for _, gradient in found]).sum(axis=0))
        mean = sum(loss for loss, _ in found) / len(found)
        state.loss = mean if state.step == 0 else 0.95 * state.loss + 0.05 * mean
        state.step += 1
        if state.step % EVERY == 0 or state.step == course.steps:
            checkpoint.save(state.step, state.tensors())
        look(state.step, state.loss)
    return Masks.of(np.array(state.alphas), course.ratio)


def divergence(model: nn.Module, lesson: Lesson, gates: Gates) -> mx.array:
    """Of what the model says through gates from what it said without, in nats for each token; over
    the tokens that are likely."""
    said = nn.log_softmax(logits(model, lesson.beginning, lesson.tokens, gates), axis=-1)
    said = mx.take_along_axis(said[lesson.first :], lesson.likely, axis=-1)
    wanted = mx.log(mx.maximum(lesson.shares, 1e-30))
    return (lesson.shares * (wanted - said)).sum(axis=-1).mean()


def gates_of(masks: Masks) -> Gates:
    """What the cache does with a mask."""
    return Gates(mx.array(masks.kept.astype(np.float32)), mx.array(masks.groups == 0))


def _gates(state: _State, course: Course) -> Gates:
    if state.step >= course.first:
        return gates_of(Masks.of(np.array(state.alphas), course.ratio))
    return Gates(state.alphas, mx.zeros(state.alphas.shape[:2], mx.bool_))


def _gradient(model: nn.Module, lesson: Lesson, gates: Gates) -> tuple[float, mx.array]:
    """The divergence of a lesson, and by how much it changes with the gates."""

    def loss(values: mx.array) -> mx.array:
        return divergence(model, lesson, Gates(values, gates.empty))

    value, gradient = mx.value_and_grad(loss)(gates.values)
    mx.eval(value, gradient)
    mx.clear_cache()
    return float(value), gradient


def _move(state: _State, course: Course, gradient: mx.array) -> None:
    if state.step < course.first:
        gradient = gradient + course.price / gradient.size * mx.sign(state.alphas)
    elif state.step == course.first:
        state.optimizer = _State(state.alphas).optimizer
    state.optimizer.learning_rate = course.rate_of(state.step)
    moved = state.optimizer.apply_gradients({"alphas": gradient}, {"alphas": state.alphas})
    state.alphas = mx.clip(moved["alphas"], 0, 1)
    mx.eval(state.alphas, state.optimizer.state)
