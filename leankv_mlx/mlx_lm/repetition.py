"""Judging a document without knowing what will be asked of it.

The model is made to repeat the document, part by part, against its own cache; how much attention a
token receives in that pass says how much it is needed to tell the document again (KVzip,
arXiv 2505.23416).
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from mlx import nn

from leankv_mlx.cache import Sequence, Sequences
from leankv_mlx.mlx_lm.reading import Pace, read
from leankv_mlx.sparsity import LargestReceived

PART = 512
"""Tokens that are repeated at a time."""
LEAD = 8
"""Tokens before a part that are repeated with it, to say where it begins."""


def judges_by_repetition(caches: abc.Sequence[Any]) -> bool:
    """Whether the settings of the caches ask for it (scores=repeat)."""
    return bool(_repeating(caches))


def settle_document(
    model: nn.Module,
    caches: list[Any],
    tokens: abc.Sequence[int],
    instruction: abc.Sequence[int] = (),
    *,
    pace: Pace | None = None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """A document was read, and no question is known yet.

    With scores=repeat its stored tokens are judged and placed, which costs about as much as
    reading did, and later questions find what is left. Otherwise no token is dropped yet. What
    comes next is judged by queries that come next, not by those of the document. Key channels that
    a mask leaves out need no question: they go at once, and a document is repeated without them.

    Args:
        model: the model that read it.
        caches: its cache list, which holds `tokens` and nothing else.
        tokens: of the document.
        instruction: tokens that ask for the repetition, for models that need to be asked.
        pace: how often `look` is called; None calls it once a part.
        look: may raise to stop; no token is then dropped.
    """
    sequences = Sequences.of(caches)
    sequences.forget_queries()  # or at=chunk drops tokens of the copies that repeat the document
    sequences.narrow()
    if judges_by_repetition(caches):
        with sequences.reading():  # it need not keep to a budget before it is judged
            _repeat_and_place(model, caches, tokens, instruction, pace, look)


def _repeat_and_place(
    model: nn.Module,
    caches: list[Any],
    tokens: abc.Sequence[int],
    instruction: abc.Sequence[int],
    pace: Pace | None,
    look: Callable[[], None],
) -> None:
    judged = _repeating(caches)
    collectors = [[LargestReceived() for _ in sequence.stored] for sequence in judged]
    for start in range(0, len(tokens) if any(collectors) else 0, PART):
        part = tokens[max(0, start - LEAD) : start + PART]
        twins = deepcopy(caches)
        for sequence, own in zip(_repeating(twins), collectors, strict=True):
            for layer, collector in zip(sequence.stored, own, strict=True):
                layer.collector = collector
        # More than 8 tokens, or the call would count as decoding.
        again = [*instruction, *part, *part[: max(0, 9 - len(part) - len(instruction))]]
        read(model, again, twins, pace, lambda done: look())
    for sequence, own in zip(judged, collectors, strict=True):
        scores = [c.scores for c in own if c.scores is not None]
        if len(scores) == len(own):  # a layer on the fallback path tells nothing
            sequence.place_by(scores)


def _repeating(caches: abc.Sequence[Any]) -> list[Sequence]:
    """The sequences whose settings ask for it."""
    return [x for x in Sequences.of(caches) if x.policy.drops and x.scorer.repeats]
