"""A course from a model to its mask: what is asked for, what it needs, and where it is kept."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from leankv_mlx.cache.masks import Masks, save
from leankv_mlx.errors import ContextLengthError, UsageError
from leankv_mlx.evaluation.lab import Progress
from leankv_mlx.learning.beginning import layers_of
from leankv_mlx.learning.checkpoint import Checkpoint
from leankv_mlx.learning.lessons import Material, prepare
from leankv_mlx.learning.masks import METHOD, Course, learn
from leankv_mlx.learning.sizes import By, worth_by
from leankv_mlx.mlx_lm.context import context_length
from leankv_mlx.mlx_lm.loading import LoadedModel, fingerprint, load
from leankv_mlx.mlx_lm.patches import asking
from leankv_mlx.mlx_lm.precision import compute_in_float32

_LESSON_TOKENS = 128
"""Of the tokens behind a beginning, about: what a step weighs beside the reading of documents."""
_LEAST_TOKENS = 512
"""Of the longest document."""


def taught(
    model: str | None,
    name: str,
    course: Course,
    material: Material,
    progress: Progress,
    by: By = "learned",
) -> tuple[Masks, Path]:
    """Load a model, make a mask of it and write that; a course that was begun under this name goes
    on.

    Args:
        by: what channels are worth.

    Returns:
        The mask and its file.

    Raises:
        ModelError: the model cannot be loaded.
        UnsupportedError: it cannot have a mask.
        ContextLengthError: documents of this length do not fit its context.
        UsageError: there is too little text, or documents are too short.
        CalibrationError: the mask, or the state of the course, cannot be written.
    """
    if material.documents < 1:
        raise UsageError(f"--documents {material.documents} is too small; give at least 1.")
    if material.tokens < _LEAST_TOKENS:
        raise UsageError(f"--tokens {material.tokens} is too small; give at least {_LEAST_TOKENS}.")
    # Products of the native backend have no gradients.
    loaded = load(model, projections="mlx")
    compute_in_float32(loaded.model)  # the bundled one, too, which `load` leaves as it is
    shapes = _checked(loaded, material.tokens)
    identity = fingerprint(loaded.path)
    text = "" if material.text is None else hashlib.sha256(material.text.encode()).hexdigest()
    described = {**asdict(replace(material, text=None)), **asdict(course)}
    checkpoint = Checkpoint(name, {**described, "method": METHOD, "model": identity, "text": text})
    if by == "learned":
        found = _learned(loaded, course, material, checkpoint, progress)
    else:
        worth = worth_by(by, loaded, shapes, material)
        found, described = Masks.of(worth, course.ratio), {"seed": material.seed}
    notes = {"by": by, **{key: str(value) for key, value in described.items() if value is not None}}
    notes |= {"text": text[:8] or "generated"}
    found = replace(found, model=identity, name=loaded.path.name, notes=notes)
    path = save(found, name)
    if by == "learned":
        checkpoint.remove()
    return found, path


def _learned(
    loaded: LoadedModel,
    course: Course,
    material: Material,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Masks:
    progress.start(material.work + 2 * _LESSON_TOKENS * course.steps)
    done = 0

    def look(step: int, loss: float) -> None:
        nonlocal done
        what = f"step {step} of {course.steps}, divergence {loss:.4f}"
        progress.advance(what, 2 * _LESSON_TOKENS * (step - done))  # those of a killed run too
        done = step

    with asking(loaded.model):
        lessons = prepare(loaded, material, progress.advance)
        return learn(loaded.model, lessons, course, material.seed, checkpoint, look)


def _checked(loaded: LoadedModel, tokens: int) -> list[tuple[int, int]]:
    """KV heads and head_dim of each compressed layer, if the model can learn a mask from documents
    of so many tokens.

    Raises:
        UnsupportedError: it cannot have one.
        ContextLengthError: they do not fit its context.
    """
    context = context_length(loaded.config)
    if context is not None and tokens + _LESSON_TOKENS > context:
        raise ContextLengthError(
            f"documents of {tokens} tokens and a question do not fit the model's context of "
            f"{context}; give fewer --tokens."
        )
    return layers_of(loaded.model, "learning masks")[1]
