"""What is said to all caches of a model at once: its cache list, as mlx-lm makes it.

Entries that are not ours, or keep all tokens, are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.sparsifier import Sparsifier


def act_together(caches: Iterable[Any]) -> None:
    """Let the policies of the caches of one model see all its layers at once.

    Args:
        caches: a new or restored cache list, in the model's order.
    """
    ours = [c for c in _flat(caches) if isinstance(c, CompressedKVCache) and c.sparsifier]
    if not ours:
        return
    sparsifier = Sparsifier(ours[0].config)
    for cache in ours:
        cache.act_with(sparsifier)


@contextmanager
def reading(caches: Iterable[Any], tokens: float = math.inf, step: int = 1) -> Iterator[None]:
    """Inside of the block the model reads a prompt, and may then generate.

    The prompt stays whole until it is in, whatever the sizes of the calls. Where nobody says so,
    the second call in a row of the same size up to 8 tokens, or 64 tokens in such calls, are taken
    for the end of the prompt, and a budget in bytes holds before it, too.

    Args:
        tokens: of the prompt that are still to come; infinite if it does not end inside.
        step: the most tokens that are then generated in a call.
    """
    found = _sparsifiers(caches)
    for sparsifier in found:
        sparsifier.begin_prompt(tokens, step)
    try:
        yield
    finally:
        for sparsifier in found:
            sparsifier.leave_prompt()


def end_prompt(caches: Iterable[Any]) -> None:
    """Say that the whole prompt is in."""
    for sparsifier in _sparsifiers(caches):
        sparsifier.end_prompt()


def forget_queries(caches: Iterable[Any]) -> None:
    """Let stored tokens be judged by what comes next alone, as if they came from a file."""
    for sparsifier in _sparsifiers(caches):
        sparsifier.forget_queries()


def place_by(caches: Iterable[Any], scores: Sequence[mx.array]) -> None:
    """Let the policy place all stored tokens by given scores.

    Args:
        caches: a cache list.
        scores: significance of each layer that has stored tokens and a policy, float32 [H, S].
    """
    for sparsifier in _sparsifiers(caches):
        sparsifier.place_by([np.array(score) for score in scores])


def is_prefix(caches: Iterable[Any], tokens: int) -> bool:
    """Whether the caches can be cut to their first `tokens` tokens for a prompt that begins with
    them, see `CompressedKVCache.is_prefix`."""
    return all(
        cache.is_prefix(tokens) if isinstance(cache, CompressedKVCache) else cache.is_trimmable()
        for cache in _flat(caches)
    )


def can_rewind(caches: Iterable[Any]) -> bool:
    """Whether the last tokens can be taken back while a model generates."""
    return all(isinstance(c, CompressedKVCache) or c.is_trimmable() for c in _flat(caches))


def rewind(caches: Iterable[Any], tokens: int) -> int:
    """Take back the last tokens, drafts that were not accepted; returns how many.

    To be called after every verification, for 0 tokens, too: it says that the prompt is in.

    Raises:
        DroppedTokensError: see `CompressedKVCache.rewind`.
    """
    entries = list(caches)
    if not entries or not can_rewind(entries):
        return 0
    for sparsifier in _sparsifiers(entries):
        sparsifier.rewound()
    removed = [
        cache.rewind(tokens) if isinstance(cache, CompressedKVCache) else cache.trim(tokens)
        for cache in entries
    ]
    return int(removed[0])


def _sparsifiers(caches: Iterable[Any]) -> list[Sparsifier]:
    """Each once."""
    ours = (c for c in _flat(caches) if isinstance(c, CompressedKVCache))
    return list({id(c.sparsifier): c.sparsifier for c in ours if c.sparsifier}.values())


def _flat(caches: Iterable[Any]) -> Iterable[Any]:
    for cache in caches:
        children = getattr(cache, "caches", None)  # mlx-lm's CacheList
        if children is None:
            yield cache
        else:
            yield from _flat(children)
