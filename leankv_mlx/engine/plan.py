"""The longest context that fits a machine, from the cache's own byte accounting."""

from __future__ import annotations

import re
from dataclasses import dataclass

from leankv_mlx.config import CompressionConfig, profiles
from leankv_mlx.engine.catalogue import CatalogueEntry
from leankv_mlx.errors import UsageError

RESERVE = 2 * 10**9
"""Bytes left to the system and to activations unless something else is asked for."""
_FP16_STEP = 256
"""Tokens by which mlx-lm's own cache grows."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One setting.

    Attributes:
        profile: its name, "fp16" for the uncompressed cache.
        kv: its text form.
        tokens: longest context, at most the model's own.
        kv_bytes: bytes allocated for the cache at that length.
        limited_by: "memory" or "model".
    """

    profile: str
    kv: str
    tokens: int
    kv_bytes: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits: `kv_budget` is memory less weights less reserve."""

    model: CatalogueEntry
    memory: int
    reserve: int
    kv_budget: int
    rows: tuple[PlanRow, ...]


def plan(entry: CatalogueEntry, memory: int, reserve: int = RESERVE) -> Plan:
    """The longest context of a model with fp16 and with each profile."""
    budget = memory - entry.weights - reserve
    settings: list[tuple[str, str, CompressionConfig | None]] = [("fp16", "none", None)]
    for name, spec in profiles().items():
        config = CompressionConfig.parse(f"leankv:{spec}")
        settings.append((name, config.spec(), config))
    rows = tuple(_row(entry, budget, *setting) for setting in settings)
    return Plan(entry, memory, reserve, budget, rows)


def kv_bytes(entry: CatalogueEntry, config: CompressionConfig | None, tokens: int) -> int:
    """Bytes allocated for `tokens` tokens, as the buffers of the caches would be."""
    from leankv_mlx.cache.memory import planned

    row = 4 * entry.kv_heads * entry.head_dim  # keys and values of a token at two bytes
    sliding = entry.sliding_layers * min(tokens, entry.window) * row
    if config is None:
        steps = -(-tokens // _FP16_STEP) * _FP16_STEP
        return entry.full_layers * steps * row + sliding
    layer = planned(config, tokens, entry.kv_heads, entry.head_dim, entry.head_dim)
    return entry.full_layers * layer.allocated + sliding


def parse_bytes(text: str) -> int:
    """16GB, 512MB, 1.5GiB or a number of bytes.

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise UsageError(f"'{text}' is not a size; use for example 16GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _row(
    entry: CatalogueEntry, budget: int, profile: str, kv: str, config: CompressionConfig | None
) -> PlanRow:
    if kv_bytes(entry, config, entry.context) <= budget:
        tokens, limit = entry.context, "model"
    else:
        low, high = 0, entry.context
        while high - low > 1:
            middle = (low + high) // 2
            if kv_bytes(entry, config, middle) <= budget:
                low = middle
            else:
                high = middle
        tokens, limit = low, "memory"
    return PlanRow(profile, kv, tokens, kv_bytes(entry, config, tokens), limit)
