"""One row per architecture: how a GGUF model is called and arranged in mlx-lm.

A row maps the tensors of a file to the parameters of mlx-lm's model class, with the shape that
each must have, and adds to the config.json what that class wants to know. Shapes are words for
sizes ("q hidden"): hidden; q and kv, all channels of the query and KV heads; qkv, both fused;
ffn and its pair gate_up; head, the channels of one head; vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from leankv_mlx.models.container import FlawError, Tensor
from leankv_mlx.models.facts import Facts
from leankv_mlx.models.rope import LINEAR, LONGROPE, NONE, YARN, rope_scaling

Change = Literal["", "unpermute", "minus one"]
"""What is done to a tensor's values: GGUF's llama has the rows of q and k in pairs for another
kind of RoPE, and Gemma's norms are 1 + w there and w in mlx-lm."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor goes.

    Attributes:
        name: of the parameter in mlx-lm, within its layer if the tensor belongs to one.
        shape: words for its sizes, rows first.
    """

    name: str
    shape: str
    change: Change = ""


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        model_type: what mlx-lm calls it.
        layer: name of a tensor behind "blk.N." -> its target.
        norm: of the whole model.
        scalings: kinds of RoPE scaling that mlx-lm's class computes.
        own_head_dim: whether head_dim can be another than hidden / heads.
        dtype: 16 bits in which the model computes well.
        config: further entries of config.json.
    """

    model_type: str
    layer: Mapping[str, Target]
    norm: Target = Target("model.norm.weight", "hidden")
    scalings: frozenset[str] = frozenset({NONE, LINEAR, YARN, LONGROPE})
    own_head_dim: bool = True
    dtype: str = "float16"
    config: Callable[[Facts, Mapping[str, int]], dict[str, Any]] = field(
        default=lambda facts, sizes: {}
    )


@dataclass(frozen=True)
class Model:
    """What a file becomes.

    Attributes:
        config: config.json, without what its quantized layers say.
        targets: tensor's name -> the parameter's full name and what is done to the values.
        head_dim: channels of a head, for "unpermute".
    """

    config: dict[str, Any]
    targets: Mapping[str, Target]
    head_dim: int


def _qkv(change: Change = "") -> dict[str, Target]:
    return {
        "attn_q.weight": Target("self_attn.q_proj.weight", "q hidden", change),
        "attn_k.weight": Target("self_attn.k_proj.weight", "kv hidden", change),
        "attn_v.weight": Target("self_attn.v_proj.weight", "kv hidden"),
    }


_QKV_BIASES = {
    "attn_q.bias": Target("self_attn.q_proj.bias", "q"),
    "attn_k.bias": Target("self_attn.k_proj.bias", "kv"),
    "attn_v.bias": Target("self_attn.v_proj.bias", "kv"),
}
_QK_NORMS = {
    "attn_q_norm.weight": Target("self_attn.q_norm.weight", "head"),
    "attn_k_norm.weight": Target("self_attn.k_norm.weight", "head"),
}
_OUT = {"attn_output.weight": Target("self_attn.o_proj.weight", "hidden q")}
_DOWN = {"ffn_down.weight": Target("mlp.down_proj.weight", "hidden ffn")}
_MLP = {
    "ffn_gate.weight": Target("mlp.gate_proj.weight", "ffn hidden"),
    "ffn_up.weight": Target("mlp.up_proj.weight", "ffn hidden"),
    **_DOWN,
}
_NORMS = {
    "attn_norm.weight": Target("input_layernorm.weight", "hidden"),
    "ffn_norm.weight": Target("post_attention_layernorm.weight", "hidden"),
}
_GEMMA_NORMS = {
    "attn_norm.weight": Target("input_layernorm.weight", "hidden", "minus one"),
    "post_attention_norm.weight": Target("post_attention_layernorm.weight", "hidden", "minus one"),
    "ffn_norm.weight": Target("pre_feedforward_layernorm.weight", "hidden", "minus one"),
    "post_ffw_norm.weight": Target("post_feedforward_layernorm.weight", "hidden", "minus one"),
    "attn_q_norm.weight": Target("self_attn.q_norm.weight", "head", "minus one"),
    "attn_k_norm.weight": Target("self_attn.k_norm.weight", "head", "minus one"),
}
_FUSED = {
    "attn_qkv.weight": Target("self_attn.qkv_proj.weight", "qkv hidden"),
    "ffn_up.weight": Target("mlp.gate_up_proj.weight", "gate_up hidden"),  # the gate comes first
}


def _gemma3(facts: Facts, sizes: Mapping[str, int]) -> dict[str, Any]:
    pattern = facts.count("attention.sliding_window_pattern", 6)
    if sizes["layers"] < pattern:
        raise FlawError(f"it has {sizes['layers']} layers, and none of them sees all tokens")
    # The file does not say it: of all sizes, the 27B model alone scales by hidden / heads.
    big = sizes["layers"] == 62
    return {
        "query_pre_attn_scalar": sizes["hidden"] // sizes["heads"] if big else sizes["head"],
        "sliding_window": facts.count("attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": facts.number("rope.freq_base_swa", 10_000.0),
    }


def _phi3(facts: Facts, sizes: Mapping[str, int]) -> dict[str, Any]:
    original = facts.count("rope.scaling.original_context_length", sizes["context"])
    return {
        # mlx-lm takes the whole part of head times this.
        "partial_rotary_factor": math.nextafter(sizes["rotated"] / sizes["head"], 2),
        "original_max_position_embeddings": original,
    }


ARCHITECTURES: dict[str, Architecture] = {
    # Mistral and SmolLM call themselves llama too.
    "llama": Architecture("llama", _qkv("unpermute") | _OUT | _MLP | _NORMS),
    "qwen2": Architecture("qwen2", _qkv() | _QKV_BIASES | _OUT | _MLP | _NORMS, own_head_dim=False),
    "qwen3": Architecture("qwen3", _qkv() | _QK_NORMS | _OUT | _MLP | _NORMS),
    "gemma3": Architecture(
        "gemma3_text",
        _qkv() | _OUT | _MLP | _GEMMA_NORMS,
        norm=Target("model.norm.weight", "hidden", "minus one"),
        dtype="bfloat16",  # its activations exceed float16
        config=_gemma3,
    ),
    "phi3": Architecture(
        "phi3",
        _FUSED | _OUT | _DOWN | _NORMS,
        scalings=frozenset({NONE, LONGROPE}),
        own_head_dim=False,
        config=_phi3,
    ),
}

_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that go into config.json."""


def model_of(facts: Facts, tensors: Mapping[str, Tensor]) -> Model:
    """Map a file to mlx-lm's model, everything checked against everything else.

    Raises:
        FlawError: the architecture is unknown, a number or tensor is missing, unknown or does not
            fit the others, or mlx-lm cannot compute this model.
    """
    row = ARCHITECTURES.get(facts.architecture)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise FlawError(f"its architecture is {facts.architecture[:40]!r}; {known} are read")
    for key in ("expert_count", "attn_logit_softcapping", "final_logit_softcapping"):
        if facts.has(key):
            raise FlawError(f"it has {facts.architecture}.{key}, which is not read here")
    sizes = _sizes(facts, tensors, row)
    targets = _targets(row, sizes, tensors)
    config = {
        "model_type": row.model_type,
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "intermediate_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head"],
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": sizes["context"],
        "rope_theta": facts.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _dtype(row, tensors),
        **row.config(facts, sizes),
    }
    scaling = rope_scaling(facts, row.scalings, sizes["context"], sizes["rotated"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    return Model(config, targets, sizes["head"])


def _dtype(row: Architecture, tensors: Mapping[str, Tensor]) -> str:
    return "bfloat16" if any(t.kind == "BF16" for t in tensors.values()) else row.dtype


def _sizes(facts: Facts, tensors: Mapping[str, Tensor], row: Architecture) -> dict[str, int]:
    hidden, heads = facts.count("embedding_length"), facts.count("attention.head_count")
    kv_heads = facts.count("attention.head_count_kv", heads)
    head = facts.count("attention.key_length", max(hidden // heads, 1))
    rotated = facts.count("rope.dimension_count", head)
    ffn = facts.count("feed_forward_length")
    if heads % kv_heads or (not row.own_head_dim and heads * head != hidden):
        raise FlawError(
            f"{heads} query heads, {kv_heads} KV heads, {head} channels a head and {hidden} of "
            "the model do not go together"
        )
    if facts.count("attention.value_length", head) != head:
        raise FlawError("its keys and values have different sizes")
    partial = row.model_type == "phi3"
    if head % 2 or rotated % 2 or rotated > head or (rotated != head and not partial):
        raise FlawError(f"{rotated} of {head} channels of a head are rotated")
    embedding = tensors.get("token_embd.weight")
    return {
        "layers": facts.count("block_count"),
        "context": facts.count("context_length"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "rotated": rotated,
        "q": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        "ffn": ffn,
        "gate_up": 2 * ffn,
        "vocab": embedding.shape[0] if embedding else 0,
    }


def _targets(
    row: Architecture, sizes: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> dict[str, Target]:
    wanted = {
        "token_embd.weight": Target("model.embed_tokens.weight", "vocab hidden"),
        "output_norm.weight": row.norm,
    }
    if "output.weight" in tensors:
        wanted["output.weight"] = Target("lm_head.weight", "vocab hidden")
    # A layer that is not there ends it, so a number of layers from the file cannot make this long.
    for number in range(min(sizes["layers"], len(tensors))):
        for name, to in row.layer.items():
            full = Target(f"model.layers.{number}.{to.name}", to.shape, to.change)
            wanted[f"blk.{number}.{name}"] = full
    for name, to in wanted.items():
        shape = tuple(sizes[word] for word in to.shape.split())
        if name not in tensors:
            raise FlawError(f"the tensor {name} is missing")
        if tensors[name].shape != shape:
            raise FlawError(f"the tensor {name} has the shape {tensors[name].shape}, not {shape}")
    for name in tensors:
        if name not in wanted and name not in _FACTORS:
            raise FlawError(f"it has a tensor {name[:80]!r}, which is not read here")
    return wanted
