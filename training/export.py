"""Write a model folder in the format that mlx-lm loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.model import Llama

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export(model: Llama, tokenizer: Path, folder: Path) -> None:
    """`config.json`, `generation_config.json`, bfloat16 weights and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    special = {f"{name}_token_id": ids[settings[f"{name}_token"]] for name in ("bos", "eos", "pad")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        "tie_word_embeddings": True,
        **special,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (tokenizer / name).resolve() != (folder / name).resolve():
            shutil.copyfile(tokenizer / name, folder / name)
