"""Requests on one document, as mlx-lm's server keeps it for the next: bytes, and first tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator

from leankv_mlx.benchmarks.settings import Advance, Row
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.mlx_lm.stock import stock_store
from leankv_mlx.serving import PromptStore, held

_MODEL = "model"
"""What the stores call it."""


class _Store(Protocol):
    """mlx-lm's LRUPromptCache, and ours."""

    def fetch_nearest_cache(self, model: Any, tokens: Any) -> tuple[list[Any] | None, Any]: ...

    def insert_cache(
        self, model: Any, tokens: Any, caches: list[Any], *, cache_type: str
    ) -> None: ...


@dataclass
class _Asked:
    """What came of the requests of an arm."""

    store: _Store
    seconds: list[float] = field(default_factory=list)  # to the first token
    caches: list[list[Any]] = field(default_factory=list)


def measure_shared(
    model: nn.Module,
    arms: Sequence[Arm],
    document: list[int],
    questions: Sequence[list[int]],
    tokens: int,
    advance: Advance,
) -> list[Row]:
    """A row for each arm, which take turns.

    Args:
        document: its token ids.
        questions: those of what follows it, one for each request.
        tokens: of each reply.
    """
    asked = {arm.kv: _Asked(_store(arm, 1 + len(questions))) for arm in arms}
    for i, question in enumerate(questions):
        for arm in turn(arms, i):
            advance(f"one document, request {i + 1}, {arm.kv}")
            with arm.attached(model):
                _ask(model, asked[arm.kv], document, question, tokens)
            mx.clear_cache()
    return [_row(arm, len(document), asked[arm.kv]) for arm in arms]


def turn(arms: Sequence[Arm], i: int) -> list[Arm]:
    """All arms; who begins changes."""
    first = i % len(arms)
    return [*arms[first:], *arms[:first]]


def _store(arm: Arm, size: int) -> _Store:
    make: Callable[[int], Any] = stock_store if arm.config is None else PromptStore
    found: _Store = make(size)
    return found


def _ask(
    model: nn.Module, asked: _Asked, document: list[int], question: list[int], tokens: int
) -> None:
    """One request, as mlx-lm's server serves it: the document is kept once it is read."""
    prompt = [*document, *question]
    begin = time.perf_counter()
    caches, rest = asked.store.fetch_nearest_cache(_MODEL, prompt)
    known = len(prompt) - len(rest)
    segments = [document[known:], question] if known < len(document) else [prompt[known:]]
    generator: Any = BatchGenerator(model)
    generator.insert_segments([segments], [tokens], [caches], [prompt[:known]])
    del caches
    first = 0.0
    ended = None
    while ended is None:
        read, generated = generator.next()
        done = [one.uid for one in read if one.end_of_segment and not one.end_of_prompt]
        for extracted, ids in generator.extract_cache(done).values():
            if len(ids) == len(document):
                asked.store.insert_cache(_MODEL, ids[:], extracted, cache_type="system")
        if generated and not first:
            first = time.perf_counter() - begin
        ended = next((one.prompt_cache for one in generated if one.finish_reason), None)
    generator.close()
    mx.eval([cache.state for cache in ended])
    asked.seconds.append(first)
    asked.caches.append(ended)


def _row(arm: Arm, tokens: int, asked: _Asked) -> Row:
    one, everyone = held(asked.caches[:1]), held(asked.caches)
    kind = "used" if arm.config else "fp16"  # what is not compressed counts two bytes an element
    first, others = asked.seconds[0], statistics.median(asked.seconds[1:])
    return {
        "cache": arm.kv,
        "document_tokens": tokens,
        "requests": len(asked.caches),
        "first_s": first,
        "others_s": others,
        "others_share": others / first,
        "kv_bytes_one": getattr(one, kind),
        "kv_bytes": getattr(everyone, kind),
        "kv_ratio": getattr(everyone, kind) / getattr(one, kind),
    }
