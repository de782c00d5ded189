"""What policies cost: judging and placing at the end of a prompt, and at flushes in between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from leankv_mlx.benchmarks.fill import wait
from leankv_mlx.benchmarks.models import Models, compressed_caches
from leankv_mlx.benchmarks.settings import Advance, Row, Settings
from leankv_mlx.cache import Sequence, Sequences
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm.patches import replaced
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK
from leankv_mlx.mlx_lm.stock import hidden_states
from leankv_mlx.mlx_lm.usage import measure

USUAL = ("lean", "paper")
STEPS = 160
"""Generated tokens, several flushes among them."""


def measure_policy(settings: Settings, models: Models, advance: Advance) -> list[Row]:
    """A row for each of contexts x settings, in the first of the dtypes.

    `end_ms` is the end of the prompt beside `prompt_ms`, which reading it took; `flush_ms` is per
    generated token beside `step_ms`. Random weights attend to nearly everything alike, so much is
    kept.
    """
    rows = []
    for tokens in settings.policy:
        for name, config in settings.configs(USUAL).items():
            if not config.policy.drops:
                continue
            advance(f"policy, {models.shape.name}, {name}, {tokens} tokens")
            runs = [
                _run(models, settings.dtypes[0], config, tokens)
                for _ in range(settings.policy_rounds)
            ]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            head = {"shape": models.shape.name, "tokens": tokens, "format": name}
            shares = {
                "prompt_share": statistics.median(r["end_ms"] / r["prompt_ms"] for r in runs),
                "decode_share": statistics.median(r["flush_ms"] / r["step_ms"] for r in runs),
            }
            rows.append(head | middle | shares)
            mx.clear_cache()
    return rows


def _run(models: Models, dtype: str, config: CompressionConfig, tokens: int) -> dict[str, float]:
    """One prompt and some generated tokens, in milliseconds."""
    models.check_memory([dtype], tokens, 1)
    model = models.of(dtype)
    ids = mx.random.randint(0, models.shape.vocab, (1, tokens + STEPS))
    mx.eval(ids)
    with compressed_caches(model, {"": config}) as made:
        caches = made[""]
        start = time.perf_counter()
        # Timed by itself, without the logits and the cleared buffers of `reading.prefill`.
        for at in range(0, tokens, PREFILL_CHUNK):
            mx.eval(hidden_states(model, ids[:, at : min(at + PREFILL_CHUNK, tokens)], caches))
            wait(caches)
        read = time.perf_counter()
        Sequences.of(caches).end_prompt()
        wait(caches)
        ended = time.perf_counter()
        ratio = measure(caches).ratio
        with _timed_flushes(caches) as flushes:
            begin = time.perf_counter()
            for i in range(STEPS):
                mx.eval(model(ids[:, tokens + i : tokens + i + 1], cache=caches))
            steps = time.perf_counter() - begin
    return {
        "prompt_ms": 1e3 * (read - start),
        "end_ms": 1e3 * (ended - read),
        "step_ms": 1e3 * steps / STEPS,
        "flush_ms": 1e3 * sum(flushes) / STEPS,
        "ratio": ratio,
    }


@contextmanager
def _timed_flushes(caches: list[Any]) -> Iterator[list[float]]:
    """The seconds of every flush inside of the block, until its results are there."""
    seconds: list[float] = []
    original = Sequence.flush

    def flush(self: Sequence, layer: Any) -> None:
        wait(caches)
        start = time.perf_counter()
        original(self, layer)
        wait(caches)
        seconds.append(time.perf_counter() - start)

    with replaced(Sequence, "flush", flush):
        yield seconds
