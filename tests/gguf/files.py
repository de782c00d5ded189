"""Tiny GGUF files of every architecture, made from the weights of tiny mlx-lm models.

What llama.cpp's converter does to weights is written down here once more, from its side, so that a
wrong row of ours cannot hide behind itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from mlx import nn
from mlx.utils import tree_flatten

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
HIDDEN, FFN, VOCAB, CONTEXT = 256, 512, 288, 4096
DENSE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Tiny:
    """One architecture of GGUF.

    Attributes:
        module: of mlx-lm.
        args: beside those that all have.
        metadata: entries of the file for them, without the architecture's name.
        layer: mlx-lm's name in a layer -> GGUF's.
        permuted: names in GGUF whose rows llama.cpp's converter permutes.
        norm_offset: what the converter adds to norms.
        tied: whether the model has no output matrix of its own.
        factors: further tensors.
    """

    module: str
    layer: dict[str, str]
    args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    permuted: tuple[str, ...] = ()
    norm_offset: float = 0.0
    tied: bool = False
    factors: dict[str, list[float]] = field(default_factory=dict)


ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_PLAIN = ATTENTION | MLP | NORMS
_QK = ("attn_q", "attn_k")
_STRETCH = [1.0] * 16 + [8.0] * 16
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def llama3_factors() -> list[float]:
    """As llama.cpp's converter computes them for `_LLAMA3`."""
    factors = []
    for at in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 10000.0 ** (2 * at / HEAD_DIM)
        if wavelength < 1024 / 4:
            factors.append(1.0)
        elif wavelength > 1024:
            factors.append(8.0)
        else:
            smooth = (1024 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return factors


TINY: dict[str, Tiny] = {
    "llama": Tiny("llama", _PLAIN, permuted=_QK),
    "llama, tied": Tiny("llama", _PLAIN, permuted=_QK, tied=True),
    "llama, head_dim of its own": Tiny(
        "llama",
        _PLAIN,
        {"head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
        permuted=_QK,
    ),
    "llama, linear": Tiny(
        "llama",
        _PLAIN,
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        permuted=_QK,
    ),
    "llama, llama3": Tiny(
        "llama",
        _PLAIN,
        {"rope_scaling": _LLAMA3},
        permuted=_QK,
        factors={"rope_freqs.weight": llama3_factors()},
    ),
    "qwen2": Tiny("qwen2", _PLAIN, tied=True),
    "qwen2, yarn": Tiny(
        "qwen2",
        _PLAIN,
        {"rope_scaling": _YARN},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 1024,
        },
    ),
    "qwen3": Tiny("qwen3", _PLAIN | QK_NORMS, {"head_dim": 32}, {"attention.key_length": 32}),
    "gemma3": Tiny(
        "gemma3_text",
        ATTENTION | MLP | GEMMA_NORMS | QK_NORMS,
        {
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "head_dim": HEAD_DIM,
            "query_pre_attn_scalar": HEAD_DIM,
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
        {
            "attention.sliding_window": 8,
            "attention.key_length": HEAD_DIM,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        norm_offset=1.0,
        tied=True,
    ),
    "phi3": Tiny("phi3", FUSED | NORMS),
    "phi3, longrope": Tiny(
        "phi3",
        FUSED | NORMS,
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": _STRETCH[8:24],
                "short_factor": [1.0] * 16,
            },
            "original_max_position_embeddings": 1024,
        },
        {"rope.dimension_count": 32, "rope.scaling.original_context_length": 1024},
        factors={
            "rope_factors_long.weight": _STRETCH[8:24],
            "rope_factors_short.weight": [1.0] * 16,
        },
    ),
}


def built(tiny: Tiny) -> nn.Module:
    """The mlx-lm model, in float32, for which every weight matters."""
    module = import_module(f"mlx_lm.models.{tiny.module}")
    args = {
        "model_type": tiny.module,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "head_dim": HIDDEN // HEADS,
        "tie_word_embeddings": tiny.tied,
    }
    model: nn.Module = module.Model(module.ModelArgs.from_dict({**args, **tiny.args}))
    if tiny.tied and "lm_head" in model:  # gemma3 finds out from its weights
        model.sanitize({})
    key = mx.random.key(7)
    weights = []
    for name, old in tree_flatten(model.parameters()):
        key, draw = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=draw)
        new = old + 0.3 * noise if old.ndim < 2 else 2 * noise * old.shape[-1] ** -0.5
        weights.append((name, new))
    model.load_weights(weights)
    model.eval()
    return model


def _names(tiny: Tiny, model: nn.Module) -> list[tuple[str, str]]:
    """mlx-lm's name of each parameter, and GGUF's."""
    found = []
    for name, _ in tree_flatten(model.parameters()):
        path, _, kind = name.rpartition(".")
        if path.startswith("model.layers."):
            _, _, number, inner = path.split(".", 3)
            found.append((name, f"blk.{number}.{tiny.layer[inner]}.{kind}"))
        else:
            found.append((name, f"{OUTSIDE[path]}.{kind}"))
    return found


def gguf_weights(tiny: Tiny, model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """A model's weights as llama.cpp's converter names and arranges them, float32."""
    arrays = dict(tree_flatten(model.parameters()))
    found = {}
    for name, to in _names(tiny, model):
        values = np.array(arrays[name])
        if values.ndim == 1 and name.endswith("weight"):
            values = values + np.float32(tiny.norm_offset)
        stem = to.split(".")[-2]
        if stem in tiny.permuted:
            values = permuted(values, HEADS if stem == "attn_q" else KV_HEADS)
        found[to] = values
    return found


def permuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """`LlamaModel.permute` of llama.cpp's converter."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def encoded(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Values in a type; where the gguf package cannot quantize, random bits of that size."""
    number = GGMLQuantizationType[kind]
    try:
        return np.ascontiguousarray(gguf.quants.quantize(values, number))
    except NotImplementedError:
        return blocks(kind, values.shape, float(np.abs(values).max()))


_HALF_AT = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
}
"""Where the float16 scales of a block lie."""


def blocks(kind: str, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray[Any, Any]:
    """Random bits with scales for which values are not larger than about `size`."""
    draw = np.random.default_rng(sum(kind.encode()))
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = draw.integers(0, 256, (int(np.prod(shape)) // block, nbytes), np.uint8)
    for at in _HALF_AT[kind]:
        scales = draw.uniform(0.2, 1.0, len(raw)) * size / (63 * 32)
        raw[:, at : at + 2] = scales.astype("<f2")[:, None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    tiny: Tiny,
    weights: Mapping[str, np.ndarray[Any, Any]],
    kind: Callable[[str], str] = lambda name: "F32",
    more: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a file.

    Args:
        kind: name of a matrix -> its type; vectors are float32.
        more: metadata that is added, or replaces what there is.

    Returns:
        What the gguf package makes of what was written: the values of each tensor, float32.
    """
    architecture = {"gemma3_text": "gemma3"}.get(tiny.module, tiny.module)
    writer = GGUFWriter(path, architecture)
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blk."))
    own = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": layers,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        **tiny.metadata,
    }
    entries = {f"{architecture}.{key}": value for key, value in own.items()} | vocabulary()
    for key, value in (entries | dict(more or {})).items():
        _add(writer, key, value)
    exact = {}
    for name, values in weights.items():
        made = kind(name) if values.ndim > 1 else "F32"
        raw = encoded(values, made)
        number = GGMLQuantizationType[made]
        writer.add_tensor(name, raw, raw_dtype=number)
        exact[name] = gguf.quants.dequantize(raw, number)
    for name, factors in tiny.factors.items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def vocabulary() -> dict[str, Any]:
    """A tokenizer of bytes, with one token that ends and a template."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + at) for at in range(len(others))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, "th", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def dense(tiny: Tiny, exact: Mapping[str, np.ndarray[Any, Any]]) -> nn.Module:
    """The mlx-lm model with the values of a written file, in float32."""
    model = built(tiny)
    weights = []
    for name, to in _names(tiny, model):
        values = exact[to]
        if values.ndim == 1 and name.endswith("weight"):
            values = values - np.float32(tiny.norm_offset)
        stem = to.split(".")[-2]
        if stem in tiny.permuted:  # where each row came from
            rows = np.arange(len(values))
            heads = HEADS if stem == "attn_q" else KV_HEADS
            values = values[np.argsort(permuted(rows, heads))]
        weights.append((name, mx.array(values)))
    model.load_weights(weights)
    return model
