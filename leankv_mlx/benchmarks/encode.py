"""What encoding costs a decode step: all layers encode a block once in 32 tokens."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from leankv_mlx.benchmarks.fill import DTYPES, fill
from leankv_mlx.benchmarks.models import Models, compressed_caches, step
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.steps import USUAL
from leankv_mlx.benchmarks.timing import interleave
from leankv_mlx.blocks import BlockPool
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import CompressionConfig
from leankv_mlx.kernels import Centers, Rows, resolve_backend
from leankv_mlx.kernels.encode import encode

STEP = "step"


def measure_encode(settings: Settings, models: Models, advance: Advance) -> list[Row]:
    """A row for each of contexts x formats, in the first of the dtypes: `ms` is per token, and
    the baseline is the step that it is part of."""
    rows = []
    for tokens in settings.encode:
        for name, config in settings.configs(USUAL).items():
            advance(f"encode, {models.shape.name}, {name}, {tokens} tokens")
            rows.append(_measured(settings, models, tokens, name, config))
            mx.clear_cache()
    return rows


def _measured(
    settings: Settings, models: Models, tokens: int, name: str, config: CompressionConfig
) -> Row:
    dtype = settings.dtypes[0]
    models.check_memory([dtype], tokens, 1)
    with compressed_caches(models.of(dtype), {name: config}) as made:
        fill(made[name], models.heads, tokens, DTYPES[dtype])
        arms = {
            name: _encoding(models, tokens, DTYPES[dtype], config),
            STEP: step(models.of(dtype), made[name]),
        }
        timings = interleave(arms, settings.budget)
    row = compared(timings, name, [STEP])
    row["ms_per_block"] = row["ms"]
    row["ms"] /= TILE
    row["speedup"] *= TILE
    row["ratios"] = {STEP: row["ratios"][STEP] * TILE}
    head = {"shape": models.shape.name, "tokens": tokens, "format": name, "dtype": dtype}
    return {**head, **row, "share": 1 / row["speedup"]}


def _encoding(
    models: Models, tokens: int, dtype: mx.Dtype, config: CompressionConfig
) -> Callable[[], object]:
    """Encode 32 tokens of every layer and write the blocks to the layers' pools."""
    heads, backend = models.heads, resolve_backend(config.backend)
    format = Format.of(config.k_bits, config.v_bits, heads.dim, heads.dim)
    sides = (format.k_dim, format.v_dim)
    rows = Rows(*(mx.random.normal((heads.kv, TILE, dim)).astype(dtype) for dim in sides))
    centers = Centers(*(mx.zeros((heads.kv, dim)) for dim in sides))
    mx.eval(rows, centers)
    pools = [BlockPool(format.words) for _ in range(models.shape.layers)]
    for pool in pools:
        ids = pool.allocate(heads.kv * -(-tokens // TILE))[-heads.kv :]

    def run() -> None:
        for pool in pools:
            codes = encode(rows, centers, format, config.rounding, backend)
            pool.write(ids, codes.reshape(-1, format.words))
        mx.eval([pool.array for pool in pools])

    return run
