"""How many tokens a model was made for, as its config.json says it.

mlx-lm itself reads on at any length; what is refused here must be no more than what the model
cannot do. Where a config can be read in two ways, the longer one counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_LENGTHS = (
    "max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx",
    "seq_length",
)  # fmt: skip
_PARTS = ("text_config", "language_config", "llm_config")
"""Where configs of models that see or hear have that of their language model."""
_SCALINGS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"
_STRETCHING = ("linear", "dynamic")
"""Kinds of RoPE scaling whose factor is for the length that the config gives."""
_STRETCHED = ("gemma3", "gemma3_text")
"""Models whose config gives the length with the factor in it."""
_UNKNOWN = 1 << 20
"""Tokens to plan with where a config does not say."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for, with its RoPE scaling; None if its config does not say."""
    for part in (config, *(config.get(name) for name in _PARTS)):
        if not isinstance(part, Mapping):
            continue
        length = next(filter(None, (_count(part.get(key)) for key in _LENGTHS)), None)
        if length:
            stretched = (_scaled(part, scaling, length) for scaling in _scalings(part, config))
            return max([length, *stretched])
    return None


def longest_context(config: Mapping[str, Any]) -> int:
    """Tokens that a model was made for; very many if it does not say."""
    return context_length(config) or _UNKNOWN


def _scalings(*parts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The RoPE scalings of the first part that has any; it may have one for each kind of layer."""
    for part in parts:
        for name in _SCALINGS:
            found = part.get(name)
            if isinstance(found, Mapping) and found:
                yield found
                yield from (each for each in found.values() if isinstance(each, Mapping))
                return


def _scaled(part: Mapping[str, Any], scaling: Mapping[str, Any], length: int) -> int:
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
        return 0
    original = _count(scaling.get(_ORIGINAL)) or _count(part.get(_ORIGINAL))
    if original:
        return math.floor(original * factor)
    kind = str(scaling.get("rope_type") or scaling.get("type"))
    stretches = kind in _STRETCHING and part.get("model_type") not in _STRETCHED
    return math.floor(length * factor) if stretches or "yarn" in kind else 0


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
