"""The context of a model as configs of real models say it.

The kind of fault: a prompt is refused that mlx-lm answers, because one number was read alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from leankv_mlx.errors import ContextLengthError
from leankv_mlx.mlx_lm.loading import check_context, context_length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR8 = {"rope_type": "linear", "factor": 8.0}

CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "Llama 2": ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
    "Qwen2.5 with YaRN, as its card says": (
        {"max_position_embeddings": 32768, "rope_scaling": {**YARN, "type": "yarn"}}, 131072),
    "Qwen3 with YaRN": ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
    "YaRN without the original": (
        {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4}}, 131072),
    "DeepSeek V3": ({"max_position_embeddings": 163840, "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
    "gpt-oss": ({"max_position_embeddings": 131072, "initial_context_length": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0,
                         "original_max_position_embeddings": 4096}}, 131072),
    "Llama 3.1": ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
    "Llama 3.1, shortened": ({"max_position_embeddings": 8192, "rope_scaling": LLAMA3}, 65536),
    "Vicuna 16k": ({"max_position_embeddings": 4096, "rope_scaling": {
        "type": "linear", "factor": 4.0}}, 16384),
    "dynamic NTK": ({"max_position_embeddings": 2048, "rope_scaling": {
        "type": "dynamic", "factor": 2.0}}, 4096),
    "Phi-3 mini 128k": ({"max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, 131072),
    "Phi-3, told by a factor": ({"max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rope_scaling": {
            "type": "longrope", "factor": 32}}, 131072),
    "Gemma 3 4B": ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
        "max_position_embeddings": 131072, "rope_scaling": LINEAR8}}, 131072),
    "rope_parameters": ({"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
    "rope_parameters by kind of layer": ({"max_position_embeddings": 32768, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}, 131072),
    "nested, scaling beside it": (
        {"rope_scaling": YARN, "text_config": {"max_position_embeddings": 32768}}, 131072),
    "Qwen2.5-VL": ({"max_position_embeddings": 128000, "rope_scaling": {
        "type": "mrope", "mrope_section": [16, 24, 24]}}, 128000),
    "GPT-2": ({"n_positions": 1024, "n_ctx": 1024}, 1024),
    "MPT": ({"max_seq_len": 2048}, 2048),
    "nothing said": ({"hidden_size": 64}, None),
    "no numbers": ({"max_position_embeddings": True, "n_ctx": "many", "text_config": 3}, None),
    "a factor that is none": ({"max_position_embeddings": 512, "rope_scaling": {
        "type": "linear", "factor": float("nan")}}, 512),
    "a factor in words": ({"max_position_embeddings": 512, "rope_scaling": {
        "type": "yarn", "factor": "4"}}, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_context_is_that_of_the_model_with_its_scaling(name: str) -> None:
    config, expected = CASES[name]
    assert context_length(config) == expected


def test_a_prompt_within_the_scaled_context_is_read() -> None:
    config = {"max_position_embeddings": 32768, "rope_scaling": YARN}
    assert check_context(config, 100_000, -1) == 31_072
    with pytest.raises(ContextLengthError, match="131072"):
        check_context(config, 131_072, -1)
