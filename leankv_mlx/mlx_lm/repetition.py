"""Judging a document without knowing what will be asked of it.

The model is made to repeat the document, part by part, against its own cache; how much attention a
token receives in that pass says how much it is needed to tell the document again (KVzip,
arXiv 2505.23416).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache import CompressedKVCache, place_by
from leankv_mlx.sparsity import LargestReceived

PART = 512
"""Tokens that are repeated at a time."""
LEAD = 8
"""Tokens before a part that are repeated with it, to say where it begins."""


def judges_by_repetition(caches: Sequence[Any]) -> bool:
    """Whether the settings of the caches ask for it (scores=repeat)."""
    return any(cache.config.scores == "repeat" for cache in _with_policy(caches))


def repeat_and_place(
    model: nn.Module, caches: list[Any], tokens: Sequence[int], instruction: Sequence[int] = ()
) -> None:
    """Drop and demote stored tokens of a document that was read; later questions keep what is left.

    Does nothing unless the settings say scores=repeat. Costs about as much as reading did.

    Args:
        model: the model that read them.
        caches: its cache list, which holds `tokens` and nothing else.
        tokens: of the document.
        instruction: tokens that ask for the repetition, for models that need to be asked.
    """
    layers = [c for c in _with_policy(caches) if c.layer and c.layer.body]
    if not layers or not judges_by_repetition(caches):
        return
    collectors = [LargestReceived() for _ in layers]
    for start in range(0, len(tokens), PART):
        part = tokens[max(0, start - LEAD) : start + PART]
        twins = deepcopy(caches)
        listening = [c for c in _with_policy(twins) if c.layer and c.layer.body]
        for cache, collector in zip(listening, collectors, strict=True):
            assert cache.layer is not None
            cache.layer.collector = collector
        # More than 8 tokens, or the call would count as decoding.
        read = [*instruction, *part, *part[: max(0, 9 - len(part) - len(instruction))]]
        mx.eval(model(mx.array([read]), cache=twins))
    place_by(caches, [c.scores for c in collectors if c.scores is not None])


def _with_policy(caches: Sequence[Any]) -> Iterator[CompressedKVCache]:
    for cache in caches:
        if isinstance(cache, CompressedKVCache) and cache.config.policy != "keep_all":
            yield cache
        else:
            yield from _with_policy(getattr(cache, "caches", ()))
