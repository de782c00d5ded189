"""Whole decode steps of a model, beside the same model on mlx-lm's own caches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from leankv_mlx.benchmarks.fill import DTYPES, STOCK, fill
from leankv_mlx.benchmarks.models import Models, attached, step, stock_caches
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.timing import interleave
from leankv_mlx.mlx_lm.attachment import Attachment, products_of
from leankv_mlx.mlx_lm.usage import measure

USUAL = ("k4v4",)
STOCK_DTYPE = "bf16"
"""Of the model that runs on mlx-lm's quantized caches."""


def measure_steps(settings: Settings, models: Models, advance: Advance) -> list[Row]:
    """A row for each of contexts x dtypes x formats."""
    rows = []
    if any(config.sparse for config in settings.configs(USUAL).values()):
        models = Models(models.shape, quantized=True)
    for tokens in settings.steps:
        advance(f"decode steps, {models.shape.name}, {tokens} tokens")
        rows += _group(settings, models, tokens)
        mx.clear_cache()
    return rows


def _group(settings: Settings, models: Models, tokens: int) -> list[Row]:
    """One interleaved run: every format in every dtype, and all baselines."""
    configs = settings.configs(USUAL)
    dtypes = tuple(dict.fromkeys((*settings.dtypes, *settings.more_dtypes)))
    models.check_memory(dtypes, tokens, len(configs) * len(settings.dtypes))
    arms: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    attachments: dict[str, Attachment] = {}

    def add(name: str, dtype: str, caches: list[Any], attachment: Attachment | None = None) -> None:
        model = models.of(dtype)
        fill(caches, models.heads, tokens, DTYPES[dtype])
        sizes[name] = measure(caches).used
        products = products_of(model, attachment) if models.quantized else None
        arms[name] = step(model, caches, products)

    with ExitStack() as stack:
        for dtype in settings.dtypes:
            made = stack.enter_context(attached(models.of(dtype), configs))
            for name, one in made.items():
                add(f"{name} {dtype}", dtype, one.caches, one.attachment)
                attachments[f"{name} {dtype}"] = one.attachment
        for dtype in dtypes:
            add(dtype, dtype, stock_caches(models.shape))
        if tokens <= settings.stock_tokens and models.shape.head_dim % 64 == 0:
            for name, bits in STOCK.items():
                add(name, STOCK_DTYPE, stock_caches(models.shape, bits))
        timings = interleave(arms, settings.budget)
        read = {name: attachment.weights_read for name, attachment in attachments.items()}
    baselines = [*dtypes, *(name for name in STOCK if name in arms)]
    return [
        {
            "shape": models.shape.name,
            "tokens": tokens,
            "format": name,
            "dtype": dtype,
            **compared(timings, f"{name} {dtype}", baselines),
            "kv_bytes": sizes[f"{name} {dtype}"],
            "baseline_kv_bytes": {base: sizes[base] for base in baselines},
            "weights_read": read[f"{name} {dtype}"],
        }
        for name in configs
        for dtype in settings.dtypes
    ]
