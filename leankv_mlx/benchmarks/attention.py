"""Attention of one new token over one layer's cache, beside mlx-lm's attention over its own.

Ours is measured as a decode step runs it: the attention of several layers, each with a cache of
its own, in one evaluation. The time of one alone is mostly that of the hand-over between MLX's
threads, which a step does not pay for each layer; mlx-lm's attention takes so long that it makes no
difference there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from leankv_mlx.attention import attend_codes
from leankv_mlx.benchmarks.fill import DTYPES, STOCK, fill
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.shapes import Heads
from leankv_mlx.benchmarks.timing import interleave
from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import CompressionConfig
from leankv_mlx.kernels.cpu import load
from leankv_mlx.mlx_lm.stock import stock_attention, stock_cache

USUAL = ("k4v4", "k3v2")

LAYERS = 8
"""Evaluated together."""

_ONE_THREAD = " on one thread"
_BOUND = "bound"
_BOUND_PRODUCTS = 400_000_000  # per thread: milliseconds, so that starting threads does not count


def measure_attention(settings: Settings, advance: Advance) -> list[Row]:
    """A row for each of tokens x heads x formats."""
    rows = []
    configs = settings.configs(USUAL)
    for heads in settings.heads:
        for tokens in settings.attention:
            advance(f"attention, {heads.query}x{heads.kv}x{heads.dim}, {tokens} tokens")
            rows += _group(heads, tokens, configs, settings)
            mx.clear_cache()
    return rows


def _group(
    heads: Heads, tokens: int, configs: Mapping[str, CompressionConfig], settings: Settings
) -> list[Row]:
    """One interleaved run: all formats and all baselines."""
    queries = mx.random.normal((1, heads.query, 1, heads.dim))
    arms: dict[str, Callable[[], object]] = {}
    native = False
    for name, config in configs.items():
        caches = [CompressedKVCache(config) for _ in range(LAYERS)]
        own = caches[0].backend == "cpu"
        native = native or own
        fill(caches, heads, tokens, mx.bfloat16)
        arms[name] = _ours(caches, queries.astype(mx.bfloat16))
        if own:
            arms[name + _ONE_THREAD] = _on_one_thread(arms[name])
    if native:
        arms[_BOUND] = lambda: load().multiply_add_rate(_BOUND_PRODUCTS)
    baselines = _baselines(heads, tokens, queries, settings)
    timings = interleave({**arms, **baselines}, settings.budget)
    timings = timings.divided({name: LAYERS for name in arms if name != _BOUND})
    rows = []
    for name, config in configs.items():
        row: Row = {
            "tokens": tokens,
            "query_heads": heads.query,
            "kv_heads": heads.kv,
            "head_dim": heads.dim,
            "format": name,
            **compared(timings, name, list(baselines)),
        }
        if name + _ONE_THREAD in arms:
            row["one_thread_ms"] = timings.ms(name + _ONE_THREAD)
            row["thread_speedup"] = timings.ratio(name + _ONE_THREAD, name)
            least = products(heads, tokens, config) / (_BOUND_PRODUCTS * load().threads())
            row["bound_share"] = least * timings.ratio(_BOUND, name)
        rows.append(row)
    return rows


def products(heads: Heads, tokens: int, config: CompressionConfig) -> int:
    """Multiply-adds that no attention over this format can do without."""
    format = Format.of(config.k_bits, config.v_bits, heads.dim, heads.dim)
    channels = TILE * sum(bits > 0 for bits in (*format.k_bits, *format.v_bits))
    return tokens * heads.query * channels


def _ours(caches: Sequence[CompressedKVCache], queries: mx.array) -> Callable[[], object]:
    views, scale = [cache.view() for cache in caches], queries.shape[-1] ** -0.5

    def run() -> None:
        mx.eval(
            [
                attend_codes(queries, view, scale=scale, mask=None, sink_logits=None).out
                for view in views
            ]
        )

    return run


def _on_one_thread(run: Callable[[], object]) -> Callable[[], object]:
    native = load()

    def limited() -> None:
        native.use_one_thread(True)
        try:
            run()
        finally:
            native.use_one_thread(False)

    return limited


def _baselines(
    heads: Heads, tokens: int, queries: mx.array, settings: Settings
) -> dict[str, Callable[[], object]]:
    arms = {}
    for name, dtype in DTYPES.items():
        cache = stock_cache()
        fill([cache], heads, tokens, dtype)
        arms[name] = _stock(cache, queries.astype(dtype))
    if tokens <= settings.stock_tokens and heads.dim % 64 == 0:  # mlx quantizes groups of 64
        for name, bits in STOCK.items():
            cache = stock_cache(bits)
            fill([cache], heads, tokens, mx.bfloat16)
            arms[name] = _stock(cache, queries.astype(mx.bfloat16))
    return arms


def _stock(cache: Any, queries: mx.array) -> Callable[[], object]:
    mx.eval(queries)
    return lambda: mx.eval(stock_attention(queries, cache, queries.shape[-1] ** -0.5))
