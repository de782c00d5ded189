"""A course from a model to its mask: what is asked for, what it needs, and where it is kept."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from leankv_mlx.cache.masks import Masks, save
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.lab import Progress
from leankv_mlx.learning.beginning import asking, places_of
from leankv_mlx.learning.checkpoint import Checkpoint
from leankv_mlx.learning.lessons import Material, prepare
from leankv_mlx.learning.masks import Course, learn
from leankv_mlx.mlx_lm.attachment import own_caches
from leankv_mlx.mlx_lm.loading import check_context, fingerprint, load
from leankv_mlx.mlx_lm.masks import asking_shapes

_LESSON_TOKENS = 128
"""Of the tokens behind a beginning, about: what a step weighs beside the reading of documents."""


def taught(
    model: str | None, name: str, course: Course, material: Material, progress: Progress
) -> tuple[Masks, Path]:
    """Load a model, learn a mask of it and write that; a course that was begun under this name goes
    on.

    Returns:
        The mask and its file.

    Raises:
        ModelError: the model cannot be loaded.
        UnsupportedError: its attention does not ask the cache.
        ContextLengthError: documents of this length do not fit its context.
        UsageError: there is too little text.
        CalibrationError: the mask, or the state of the course, cannot be written.
    """
    if material.documents < 1 or material.tokens < 512:
        raise UsageError("learning needs a document at least, of 512 tokens; give more.")
    # Products of the native backend have no gradients.
    loaded = load(model, projections="mlx")
    check_context(loaded.config, material.tokens, _LESSON_TOKENS)
    places = places_of(loaded.model)
    caches = own_caches(loaded.model)
    asking_shapes(loaded.model, caches, [i in places for i in range(len(caches))], "learning masks")
    identity = fingerprint(loaded.path)
    text = "" if material.text is None else hashlib.sha256(material.text.encode()).hexdigest()
    described = {**asdict(replace(material, text=None)), **asdict(course)}
    checkpoint = Checkpoint(name, {"model": identity, "text": text, **described})
    progress.start(material.work + 2 * _LESSON_TOKENS * course.steps)
    with asking(loaded.model):
        lessons = prepare(loaded, material, progress.advance)

        def look(step: int, loss: float) -> None:
            done = f"step {step} of {course.steps}, divergence {loss:.4f}"
            progress.advance(done, 2 * _LESSON_TOKENS)

        found = learn(loaded.model, lessons, course, material.seed, checkpoint, look)
    notes = {key: str(value) for key, value in described.items() if value is not None}
    notes |= {"text": text[:8] or "generated"}
    found = replace(found, model=identity, name=loaded.path.name, notes=notes)
    path = save(found, name)
    checkpoint.remove()
    return found, path
