"""Tiny random-weight models, one per way in which mlx-lm models use a KV cache.

`TINY[name](head_dim=64, dtype=mx.float32)` builds one; the same name always gives the same weights.
Import as `from tests.models import TINY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 128
HIDDEN = 96
Q_HEADS, KV_HEADS = 4, 2
SLIDING_WINDOW = 32

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_attention_heads": Q_HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Tiny:
    """One architecture.

    Attributes:
        module: name of the module in `mlx_lm.models`.
        args: head_dim -> fields of its ModelArgs; fields that it lacks are dropped.
        compressed: indices of the entries of the model's cache list that attach replaces.
        fused: whether attention over those layers goes through the fused path.
    """

    module: str
    args: Callable[[int], dict[str, Any]]
    compressed: tuple[int, ...]
    fused: bool = True

    def __call__(
        self, head_dim: int = 64, dtype: mx.Dtype = mx.float32, layers: int | None = None
    ) -> nn.Module:
        module = import_module(f"mlx_lm.models.{self.module}")
        args = {**_COMMON, "model_type": self.module, **self.args(head_dim)}
        if layers:
            args["num_hidden_layers"] = layers
        seed = sum(self.module.encode())
        mx.random.seed(seed)  # what `_randomize` adds to must not differ from run to run
        model: nn.Module = module.Model(module.ModelArgs.from_dict(args))
        _randomize(model, seed)
        model.set_dtype(dtype)
        model.eval()
        mx.eval(model.parameters())
        return model


def _randomize(model: nn.Module, seed: int) -> None:
    """Weights for which attention is neither uniform nor one-hot, and biases and sinks matter."""
    key = mx.random.key(seed)
    weights = []
    for name, old in tree_flatten(model.parameters()):
        key, draw = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=draw)
        if old.ndim < 2 or "conv1d" in name or name.endswith("A_log"):
            new = old + (1.0 if "sink" in name else 0.1) * noise
        else:
            new = noise * old.shape[-1] ** -0.5
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            new = new * 1.5
        weights.append((name, new.astype(old.dtype)))
    model.update(tree_unflatten(weights))
    for module in model.modules():
        if getattr(module, "scale", None) == 1.0 and "q_norm" in module:
            # These models learn their scale in the norms: without this, softmax is one-hot.
            for norm in (module[name] for name in ("q_norm", "k_norm") if name in module):
                norm.weight = norm.weight * module.head_dim**-0.25


def _gemma3n(head_dim: int) -> dict[str, Any]:
    text = {
        **_COMMON,
        "model_type": "gemma3n_text",
        "head_dim": head_dim,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": SLIDING_WINDOW,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    }
    text.pop("tie_word_embeddings")
    return {"text_config": text}


def _latent(head_dim: int) -> dict[str, Any]:
    """Multi-head latent attention: head_dim is that of the keys, the values have half of it."""
    rope = 16
    return {
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": head_dim - rope,
        "v_head_dim": head_dim // 2,
        "num_key_value_heads": Q_HEADS,
        "n_routed_experts": None,
        "moe_intermediate_size": 64,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }


TINY: dict[str, Tiny] = {
    "llama": Tiny("llama", lambda d: {"head_dim": d}, (0, 1, 2)),
    "qwen3": Tiny("qwen3", lambda d: {"head_dim": d}, (0, 1, 2)),
    "gemma3": Tiny(
        "gemma3_text",
        lambda d: {
            "head_dim": d,
            "query_pre_attn_scalar": d,
            "num_hidden_layers": 4,
            "sliding_window": SLIDING_WINDOW,
            "sliding_window_pattern": 2,
        },
        (1, 3),
    ),
    "gpt_oss": Tiny(
        "gpt_oss",
        lambda d: {
            "head_dim": d,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": SLIDING_WINDOW,
        },
        (1, 3),
    ),
    "qwen3_next": Tiny(
        "qwen3_next",
        lambda d: {
            "head_dim": d,
            "num_hidden_layers": 4,
            "full_attention_interval": 2,
            "partial_rotary_factor": 0.5,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 64,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [],
        },
        (1, 3),
    ),
    "lfm2": Tiny(
        "lfm2",
        lambda d: {
            "hidden_size": d * Q_HEADS,  # lfm2 has no head_dim of its own
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": d * Q_HEADS,
            "block_ff_dim": 128,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        (1,),
    ),
    "gemma2": Tiny(
        "gemma2",
        lambda d: {"head_dim": d, "query_pre_attn_scalar": float(d)},
        (0, 1, 2),
        fused=False,
    ),
    "gemma4": Tiny(
        "gemma4_text",
        lambda d: {
            "head_dim": d,
            "global_head_dim": d,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": SLIDING_WINDOW,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
        },
        (1,),
    ),
    "gemma3n": Tiny("gemma3n", _gemma3n, (1,)),
    "deepseek_v2": Tiny("deepseek_v2", _latent, (0, 1, 2)),  # K and V dims differ
    "deepseek_v3": Tiny("deepseek_v3", _latent, ()),  # MLA: the cache holds a latent
}
