"""Reading tokens into caches: a prompt in chunks, and those in parts that somebody can wait for.

This is the one loop over a prompt. Besides it there are those of mlx-lm's own commands, and a few
in `benchmarks` and `evaluation` that time or score what happens inside of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache import Sequences
from leankv_mlx.kernels import MAX_DECODE_TOKENS
from leankv_mlx.mlx_lm.sparse import whole

PREFILL_CHUNK = 512
"""Prompt tokens that are compressed together. It is the same everywhere, because what a cache holds
depends on it; and small, so that most of a prompt re-reads the compressed cache."""

Progress = Callable[[int, int], None]
"""Called with the tokens read so far and their number; may raise to stop."""

_STEP = 32
"""Parts are multiples of it, and the first one of a model is of this size."""
_LONGEST = 2048
_HELD_FOR_ONE = 256
"""Every part decodes all that is stored. With so many stored tokens for one that is read, that
stays the smaller share of its time."""


@dataclass
class Pace:
    """How many tokens to read between two looks at whether to go on.

    Attributes:
        seconds: time that a part should take.
        speed: tokens per second of the last part, 0 before the first.
    """

    seconds: float = 0.5
    speed: float = 0.0

    def part(self, held: int) -> int:
        """Tokens of the next part, with `held` tokens in the caches."""
        fair = max(_STEP, held // _HELD_FOR_ONE)
        return min(max(int(self.speed * self.seconds), fair) // _STEP * _STEP, _LONGEST)


def _untold(done: int, total: int) -> None:
    """Nobody waits."""


def prefill(
    model: nn.Module,
    tokens: Sequence[int],
    caches: list[Any],
    progress: Progress = _untold,
    pace: Pace | None = None,
    chunk: int = PREFILL_CHUNK,
) -> None:
    """Read a prompt, or its beginning, into caches, `chunk` tokens at a time.

    Args:
        progress: is also told that nothing is read yet.
        pace: how often progress is told within a chunk; None tells it once a chunk.
    """
    total = len(tokens)
    progress(0, total)
    for start in range(0, total, chunk):

        def look(done: int, start: int = start) -> None:
            progress(start + done, total)

        read(model, tokens[start : start + chunk], caches, pace, look)
        mx.clear_cache()


def read(
    model: nn.Module,
    tokens: Sequence[int],
    caches: list[Any],
    pace: Pace | None,
    look: Callable[[int], None],
) -> None:
    """Read tokens into caches as one update.

    Args:
        pace: cuts it into parts; None reads it whole.
        look: called after every part with the tokens read so far; may raise to stop.
    """
    size, sequences = _part(pace, caches, len(tokens)), Sequences.of(caches)
    if size == len(tokens):
        with sequences.reading(), whole(model):
            _read(model, tokens, caches, pace)
        look(size)
        return
    with sequences.reading(), sequences.one_update(), whole(model):
        done = 0
        while done < len(tokens):
            size = _part(pace, caches, len(tokens) - done)
            _read(model, tokens[done : done + size], caches, pace)
            done += size
            look(done)


def _read(model: nn.Module, part: Sequence[int], caches: list[Any], pace: Pace | None) -> None:
    start = time.perf_counter()
    model(mx.array([list(part)]), cache=caches)
    mx.eval([cache.state for cache in caches])
    if pace is not None:
        pace.speed = len(part) / max(time.perf_counter() - start, 1e-9)


def _part(pace: Pace | None, caches: list[Any], left: int) -> int:
    """Tokens of the next part. A few that would be left behind it are read with it, or the caches
    would take them for generated ones."""
    if pace is None:
        return left
    size = pace.part(max(getattr(cache, "offset", 0) for cache in caches))
    return size if left - size > MAX_DECODE_TOKENS else left
