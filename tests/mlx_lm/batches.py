"""mlx-lm's batches of a tiny model, step by step, beside its loop for one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

Caches = list[Any]
LOOPS = vars(import_module("mlx_lm.generate"))
"""Looked up at each call: they are others while a model is attached."""


def prompts(*lengths: int, seed: int = 0, vocabulary: int = 128) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


@dataclass
class Reply:
    """What one prompt got.

    Attributes:
        tokens: that were generated.
        logprobs: of each, float32 [vocab].
        cache: in the end.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[NDArray[Any]] = field(default_factory=list)
    cache: Caches | None = None

    def add(self, token: int, logprobs: mx.array) -> None:
        self.tokens.append(token)
        self.logprobs.append(np.array(logprobs))


def alone(
    model: nn.Module, prompt: list[int], tokens: int, cache: Caches | None = None, step: int = 2048
) -> Reply:
    """The reply to one prompt by itself. Its cache ends with the last token, as a batch's does."""
    reply = Reply(cache=model.make_cache() if cache is None else cache)
    loop = LOOPS["generate_step"](
        mx.array(prompt), model, max_tokens=tokens + 1, prompt_cache=reply.cache,
        prefill_step_size=step,
    )  # fmt: skip
    for token, logprobs in loop:
        reply.add(int(token), logprobs)
        if len(reply.tokens) == tokens:
            break
    return reply


class Batch:
    """A `BatchGenerator`, and what its prompts have got so far."""

    def __init__(self, model: nn.Module, step: int = 2048, **options: Any) -> None:
        self.generator = LOOPS["BatchGenerator"](model, prefill_step_size=step, **options)
        self.replies: dict[int, Reply] = {}

    def insert(self, prompts: Sequence[list[int]], tokens: Sequence[int], **more: Any) -> list[int]:
        """Let prompts join."""
        uids: list[int] = self.generator.insert(list(prompts), list(tokens), **more)
        self.replies |= {uid: Reply() for uid in uids}
        return uids

    def step(self) -> list[Any]:
        """One turn; what its prompts say about how far they are."""
        progress, generated = self.generator.next()
        for response in generated:
            reply = self.replies[response.uid]
            reply.add(response.token, response.logprobs)
            if response.finish_reason is not None:
                reply.cache = response.prompt_cache
        return list(progress)

    def run(self) -> None:
        """Until every prompt has its reply."""
        while (
            len(self.generator._unprocessed_sequences)
            + len(self.generator._prompt_batch)
            + len(self.generator._generation_batch)
        ):
            self.step()


def same(ours: Reply, theirs: Reply, tolerance: float = 1e-2) -> bool:
    """Whether two replies have the same tokens and nearly the same logprobs. Where two tokens are
    as good as each other, they may part."""
    if len(ours.tokens) != len(theirs.tokens):
        return False
    for a, b, x, y in zip(ours.tokens, theirs.tokens, ours.logprobs, theirs.logprobs, strict=True):
        if np.abs(x - y).max() > tolerance:
            return False
        if a != b:
            return bool(abs(y[a] - y[b]) < tolerance)
    return True
