"""Prefill in mlx-lm's chunks, beside the uncompressed cache in the same dtype."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

import mlx.core as mx

from leankv_mlx.benchmarks.fill import wait
from leankv_mlx.benchmarks.models import Models, compressed_caches, stock_caches
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.steps import USUAL
from leankv_mlx.benchmarks.timing import Clock, Timings
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm.stock import hidden_states

CHUNK = 2048
_WARM_UP = 64


def measure_prefill(settings: Settings, models: Models, advance: Advance) -> list[Row]:
    """A row for each of lengths x dtypes x formats."""
    rows = []
    for tokens in settings.prefill:
        for dtype in settings.prefill_dtypes:
            advance(f"prefill, {models.shape.name}, {dtype}, {tokens} tokens")
            rows += _group(settings, models, tokens, dtype)
            mx.clear_cache()
    return rows


def _group(settings: Settings, models: Models, tokens: int, dtype: str) -> list[Row]:
    configs = settings.configs(USUAL)
    models.check_memory([dtype], tokens, len(configs))
    _prompt(models, dtype, configs, _WARM_UP)
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    peaks: dict[str, int] = defaultdict(int)
    for i in range(settings.prefill_rounds):
        for name, (took, peak) in _prompt(models, dtype, configs, tokens).items():
            seconds[name][i] = took
            peaks[name] = max(peaks[name], peak)
    timings = Timings(seconds)
    return [
        {
            "shape": models.shape.name,
            "tokens": tokens,
            "format": name,
            "dtype": dtype,
            **compared(timings, name, [dtype]),
            "working_bytes": peaks[name],
            "baseline_working_bytes": {dtype: peaks[dtype]},
        }
        for name in configs
    ]


def _prompt(
    models: Models,
    dtype: str,
    configs: Mapping[str, CompressionConfig],
    tokens: int,
    clock: Clock = time.perf_counter,
) -> dict[str, tuple[float, int]]:
    """Read one prompt into all caches, in turn chunk by chunk.

    Returns:
        By name, the seconds, and the bytes that a chunk needed at most beyond what was there.
    """
    model = models.of(dtype)
    ids = mx.random.randint(0, models.shape.vocab, (1, tokens))
    mx.eval(ids)
    with compressed_caches(model, configs) as made:
        caches = {**made, dtype: stock_caches(models.shape)}
        found = dict.fromkeys(caches, (0.0, 0))
        # Not `reading.prefill`: all arms take turns, and each chunk is timed.
        for start in range(0, tokens, CHUNK):
            for name, own in caches.items():
                mx.reset_peak_memory()
                before, begin = mx.get_active_memory(), clock()
                mx.eval(hidden_states(model, ids[:, start : start + CHUNK], own))
                wait(own)
                took, peak = found[name]
                found[name] = (
                    took + clock() - begin,
                    max(peak, mx.get_peak_memory() - before),
                )
    return found
