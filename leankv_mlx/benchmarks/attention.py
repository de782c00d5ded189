"""Attention of one new token over one layer's cache, beside mlx-lm's attention over its own.

Ours is measured as a decode step runs it: the attention of all layers of a model in one
evaluation. To start and to end one takes MLX as long as much of a layer's attention, and a step
does not pay that for each layer; mlx-lm's attention takes so long that it makes no difference
there. Building the graph is not timed: the generation loop does that for the next token while this
one is evaluated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import mlx.core as mx

from leankv_mlx.benchmarks.fill import DTYPES, STOCK, fill
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.shapes import SHAPES, Heads
from leankv_mlx.benchmarks.timing import Arm, Staged, interleave
from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import CompressionConfig
from leankv_mlx.kernels import resolve_backend
from leankv_mlx.kernels.cpu import load
from leankv_mlx.kernels.decode_attention import decode_attention
from leankv_mlx.mlx_lm.stock import stock_attention, stock_cache

USUAL = ("k4v4", "k3v2")

LAYERS = SHAPES["qwen3-0.6b"].layers
"""Evaluated together."""

CACHES = 8
"""That the layers take in turn: one for each would take gigabytes at 64k tokens."""

_ALL, _ONE = "all threads", "one thread"
_BOUND_PRODUCTS = 400_000_000  # per thread: some milliseconds


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
    arms: dict[str, Staged] = {}
    native = []
    for name, config in configs.items():
        caches = [CompressedKVCache(config) for _ in range(CACHES)]
        if caches[0].backend == "cpu":
            native.append(name)
        fill(caches, heads, tokens, mx.bfloat16)
        arms[name] = decode_step(caches, queries.astype(mx.bfloat16))
    baselines = _baselines(heads, tokens, queries, settings)
    timings = interleave({**arms, **baselines}, settings.budget)
    timings = timings.divided(dict.fromkeys(arms, LAYERS))
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
        if name in native:
            row |= _threads(arms[name], products(heads, tokens, config), settings)
        rows.append(row)
    return rows


def _threads(ours: Staged, products: int, settings: Settings) -> Row:
    """One interleaved run: all threads beside one, and beside the products that they could do."""
    native = load()
    rates: dict[str, list[float]] = {_ALL: [], _ONE: []}

    def bound(name: str) -> Callable[[], object]:
        return lambda: rates[name].append(native.multiply_add_rate(_BOUND_PRODUCTS))

    arms: dict[str, Arm] = {
        _ALL: ours,
        _ONE: _on_one_thread(ours),
        _ALL + " at most": bound(_ALL),
        _ONE + " at most": _on_one_thread(bound(_ONE)),
    }
    timings = interleave(arms, settings.budget).divided({_ALL: LAYERS, _ONE: LAYERS})
    most = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "one_thread_ms": timings.ms(_ONE),
        "thread_speedup": timings.ratio(_ONE, _ALL),
        "bound_thread_speedup": most[_ALL] / most[_ONE],
        "bound_share": 1e3 * products / most[_ALL] / timings.ms(_ALL),
    }


def products(heads: Heads, tokens: int, config: CompressionConfig) -> int:
    """Multiply-adds that no attention over this format can do without."""
    format = Format.of(config.k_bits, config.v_bits, heads.dim, heads.dim)
    channels = TILE * sum(bits > 0 for bits in (*format.k_bits, *format.v_bits))
    return tokens * heads.query * channels


def decode_step(caches: Sequence[CompressedKVCache], queries: mx.array) -> Staged:
    """Attention of all layers, which have these caches in turn; queries [1, Hq, L, head_dim]."""
    views, scale = [cache.view() for cache in caches], queries.shape[-1] ** -0.5
    backend = resolve_backend(caches[0].backend)

    def make() -> list[mx.array]:
        return [
            decode_attention(
                queries[0], view, scale=scale, mask=None, sink_logits=None, backend=backend
            ).out
            for view in islice(cycle(views), LAYERS)
        ]

    return Staged(make, mx.eval)


def _on_one_thread(arm: Arm) -> Arm:
    native = load()

    def limited(run: Callable[[], object]) -> None:
        native.use_one_thread(True)
        try:
            run()
        finally:
            native.use_one_thread(False)

    if isinstance(arm, Staged):
        run = arm.run
        return Staged(arm.make, lambda made: limited(lambda: run(made)))
    return lambda: limited(arm)


def _baselines(
    heads: Heads, tokens: int, queries: mx.array, settings: Settings
) -> dict[str, Staged]:
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


def _stock(cache: Any, queries: mx.array) -> Staged:
    mx.eval(queries)
    return Staged(lambda: stock_attention(queries, cache, queries.shape[-1] ** -0.5), mx.eval)
