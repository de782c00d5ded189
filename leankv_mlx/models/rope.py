"""The scaling of RoPE: GGUF's metadata and factors as mlx-lm's `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

from leankv_mlx.models.container import FlawError
from leankv_mlx.models.facts import Facts

NONE, LINEAR, YARN, LONGROPE = "none", "linear", "yarn", "longrope"


def rope_scaling(
    facts: Facts, known: Set[str], context: int, rotated: int
) -> dict[str, Any] | None:
    """The entry of config.json, None without scaling.

    Args:
        known: kinds that mlx-lm's class of this model computes.
        context: tokens that the model was made for.
        rotated: channels of a head that are rotated.

    Raises:
        FlawError: the file asks for what cannot be computed.
    """
    kind = facts.text("rope.scaling.type", LINEAR if facts.has("rope.scale_linear") else NONE)
    single = facts.factors("rope_freqs.weight", rotated // 2)
    long = facts.factors("rope_factors_long.weight", rotated // 2)
    short = facts.factors("rope_factors_short.weight", rotated // 2)
    if kind not in known or (single and (kind != NONE or long or LONGROPE not in known)):
        raise FlawError(f"its scaling of RoPE ({kind[:40]!r}) cannot be computed here")
    if single:
        # How Llama 3 is scaled, as numbers instead of the rule that they come from. mlx-lm takes
        # numbers as longrope, and scales nothing else where original and actual context agree.
        return _factors(single, single, context)
    if long or kind == LONGROPE:
        if long is None or short is None:
            raise FlawError("its factors of RoPE are missing")
        return _longrope(facts, long, short, context)
    if kind == NONE:
        return None
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 1.0))
    return {"type": LINEAR, "factor": factor} if kind == LINEAR else _yarn(facts, factor)


def _factors(long: list[float], short: list[float], original: int) -> dict[str, Any]:
    return {
        "type": LONGROPE,
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }


def _longrope(facts: Facts, long: list[float], short: list[float], context: int) -> dict[str, Any]:
    original = facts.count("rope.scaling.original_context_length")
    # mlx-lm computes the factor of attention from the two contexts.
    stretch = context / original
    factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 < original else 1
    said = facts.number("rope.scaling.attn_factor", factor)
    if abs(said - factor) > 1e-3:
        raise FlawError(f"its longrope scales attention by {said:g} instead of {factor:g}")
    return _factors(long, short, original)


def _yarn(facts: Facts, factor: float) -> dict[str, Any]:
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if facts.number(f"rope.scaling.{key}", 1.0) != 1:
            raise FlawError(f"its {facts.architecture}.rope.scaling.{key} is not 1")
    if facts.has("rope.scaling.yarn_log_multiplier"):
        raise FlawError(f"it has {facts.architecture}.rope.scaling.yarn_log_multiplier")
    return {
        "type": YARN,
        "factor": factor,
        "original_max_position_embeddings": facts.count("rope.scaling.original_context_length"),
        "beta_fast": facts.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": facts.number("rope.scaling.yarn_beta_slow", 1.0),
    }
