"""Trained models in GGUF files: SmolLM2 in every run, the two others with `-m real`.

The same weights, dequantized by the gguf package into a dense float32 model, say what is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.utils import _get_classes, load_model, load_tokenizer

from leankv_mlx.mlx_lm.loading import resolve_model
from tests.real_models import real_model

NAMES = (
    "smollm2",
    *(pytest.param(n, marks=pytest.mark.real) for n in ("qwen2.5-coder", "gemma-3")),
)
TEXT = "The capital of France is Paris, and the river that flows through the city is called the"
PROMPTS = (
    "What is the capital of France?",
    "Write a function that adds two numbers.",
    "Tell me a story about a fox.",
    "What is 2 + 2?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Explain rain to a child.",
    "Translate 'good morning' into French.",
    "What do bees eat?",
    "List the planets.",
)

# GGUF's names in mlx-lm, once more: the rows of our own table are what is tested.
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}


@pytest.fixture(scope="module", params=NAMES)
def file(request: pytest.FixtureRequest) -> Path:
    return real_model(request.param)


def dense(path: Path, folder: Path, skip: frozenset[str] = frozenset()) -> nn.Module:
    """The model of a file in float32, dequantized by the gguf package.

    Args:
        folder: the converted model, for its config.
        skip: types whose tensors come from there instead.
    """
    model, config = load_model(folder)
    config = {key: value for key, value in config.items() if key != "quantization"}
    kind, args = _get_classes(config)
    plain = kind(args.from_dict(config))
    modules = dict(model.named_modules())
    weights = {}
    for row in GGUFReader(path).tensors:
        name = _name(row.name, gemma=config["model_type"] == "gemma3_text")
        module: Any = modules[name.rpartition(".")[0]]
        if row.tensor_type.name in skip:
            weights[name] = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            continue
        values = quants.dequantize(row.data, GGMLQuantizationType(row.tensor_type))
        weights[name] = mx.array(_arranged(row.name, values, config))
    plain.load_weights(list(plain.sanitize(weights).items()))
    plain.eval()
    return plain


def _name(name: str, gemma: bool) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_OUTSIDE[stem]}.{kind}"
    _, number, stem = stem.split(".")
    own = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    return f"model.layers.{number}.{_LAYER.get(stem, own)}.{kind}"


def _arranged(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    if config["model_type"] == "gemma3_text" and "norm" in name:
        return values - 1
    if config["model_type"] == "llama" and ("attn_q." in name or "attn_k." in name):
        heads = config["num_attention_heads" if "_q." in name else "num_key_value_heads"]
        pairs = values.reshape(heads, -1, 2, values.shape[-1])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


@pytest.fixture(scope="module")
def models(file: Path) -> tuple[nn.Module, nn.Module, Any]:
    """Ours in float32, the dense one, and the tokenizer."""
    folder = resolve_model(file)
    ours = load_model(folder)[0]
    ours.set_dtype(mx.float32)
    # Q6_K is quantized again; everything else is the file's own numbers.
    return ours, dense(file, folder, frozenset({"Q6_K"})), load_tokenizer(folder)


def test_logits_are_those_of_the_files_numbers(
    models: tuple[nn.Module, nn.Module, Any],
) -> None:
    ours, plain, tokenizer = models
    tokens = mx.array([tokenizer.encode(TEXT)])
    one, other = ours(tokens), plain(tokens)
    assert float(mx.abs(one - other).max()) < 1e-3
    assert float(mx.abs(other).max()) > 10


def test_weights_are_those_of_the_file_bit_for_bit(file: Path) -> None:
    folder = resolve_model(file)
    ours, config = load_model(folder)
    ours.set_dtype(mx.float32)
    modules = dict(ours.named_modules())
    plain = dict(tree_flatten(dense(file, folder).parameters()))
    kinds = {row.name: row.tensor_type.name for row in GGUFReader(file).tensors}
    for name, kind in kinds.items():
        to = _name(name, gemma=config["model_type"] == "gemma3_text")
        module: Any = modules[to.rpartition(".")[0]]
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            if not to.endswith("weight") or kind == "Q6_K":
                continue
            found = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            assert mx.array_equal(found, plain[to]), name


@pytest.mark.real
@pytest.mark.parametrize("prompt", PROMPTS)
def test_replies_are_those_of_the_files_numbers(
    prompt: str, models: tuple[nn.Module, nn.Module, Any]
) -> None:
    ours, plain, tokenizer = models
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    replies = [generate(model, tokenizer, prompt, max_tokens=64) for model in (ours, plain)]
    assert replies[0] == replies[1]
    assert len(replies[0]) > 3


def test_the_instruct_models_know_paris(models: tuple[nn.Module, nn.Module, Any]) -> None:
    ours, _, tokenizer = models
    if not tokenizer.has_chat_template:
        pytest.skip("a base model")
    messages = [{"role": "user", "content": PROMPTS[0]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert "Paris" in generate(ours, tokenizer, prompt, max_tokens=24)
