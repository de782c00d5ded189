"""The longest context that fits a machine, from the cache's own byte accounting."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from leankv_mlx.config import UNCOMPRESSED, CompressionConfig
from leankv_mlx.engine.catalogue import CatalogueEntry
from leankv_mlx.profiles import profiles

RESERVE = 2 * 10**9
"""Bytes left to the system and to activations unless something else is asked for."""
_FP16_STEP = 256
"""Tokens by which mlx-lm's own cache grows."""


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
    """The longest context of a model with fp16 and with each profile that suits it; none with a
    mask or a basis, because a name and some sizes do not tell that it is of this model.

    A policy drops tokens when the whole prompt is in, so it does not let a longer one in.
    """
    budget = memory - entry.weights - reserve
    settings: list[tuple[str, str, CompressionConfig | None]] = [("fp16", UNCOMPRESSED, None)]
    for name, spec in profiles().items():
        try:
            config = CompressionConfig.parse(f"leankv:{spec}", stored=True)
        except ValueError:  # one of the user's own; it is said when it is used
            continue
        learned = config.mask or config.basis
        if learned or len(config.layer_bits) not in (0, entry.full_layers):
            continue  # of another model, as far as anyone knows
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
    layers = Counter(config.for_layer(i, entry.full_layers) for i in range(entry.full_layers))
    dims = entry.kv_heads, entry.head_dim, entry.head_dim
    return sliding + sum(n * planned(c, tokens, *dims).allocated for c, n in layers.items())


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
