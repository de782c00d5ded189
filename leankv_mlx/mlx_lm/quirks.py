"""What is special about some of mlx-lm's models and caches: one row per quirk, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx import nn

LEFT_ALONE: dict[str, str] = {
    "ArraysCache": "recurrent state, not keys and values",
    "CacheList": "several caches in one layer",
    "ConcatenateKVCache": "not the standard KV cache",
    "ChunkedKVCache": "chunked attention: its length is bounded already",
    "RotatingKVCache": "sliding window: its length is bounded already",
}
"""Cache classes of mlx-lm that are not replaced, and why."""
OTHER_CACHE = "not the standard KV cache"


@dataclass(frozen=True)
class Quirk:
    """A property of a whole model that changes how it is attached to.

    Attributes:
        name: what the report calls it.
        applies: whether a module of the model shows it.
        reason: why it matters.
        compress: whether the model's KV caches are compressed.
        keep_fetched: see `CompressedKVCache`.
    """

    name: str
    applies: Callable[[nn.Module], bool]
    reason: str
    compress: bool = True
    keep_fetched: bool = False


def _absorbs_latent(module: nn.Module) -> bool:
    return "embed_q" in module and "unembed_out" in module


def _defined_in(*names: str) -> Callable[[nn.Module], bool]:
    modules = {f"mlx_lm.models.{name}" for name in names}
    return lambda module: type(module).__module__ in modules


QUIRKS: tuple[Quirk, ...] = (
    # bailing_hybrid, bailing_moe_v3, deepseek_v3, deepseek_v32, glm4_moe_lite, kimi_k3,
    # kimi_linear, longcat_flash, mistral4 and what builds on them. deepseek_v2, minicpm3 and
    # youtu_llm have latent attention too, but cache full keys and values.
    Quirk(
        "latent attention",
        _absorbs_latent,
        "latent attention (MLA): the cache holds a small latent instead of keys and values",
        compress=False,
    ),
    Quirk(
        "keys and values reused",
        _defined_in("afm7", "gemma3n"),
        "later layers take keys and values from an earlier layer's cache object",
        keep_fetched=True,
    ),
)


def quirks_of(model: nn.Module) -> list[Quirk]:
    """The rows of `QUIRKS` that some module of `model` shows."""
    modules = model.modules()
    return [quirk for quirk in QUIRKS if any(map(quirk.applies, modules))]


def left_alone(cache: Any) -> str:
    """Why an entry of a model's cache list that is not a plain KVCache stays as it is."""
    return LEFT_ALONE.get(type(cache).__name__, OTHER_CACHE)
