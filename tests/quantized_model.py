"""The bundled model with quantized weights, as a folder that mlx-lm loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from leankv_mlx.mlx_lm.loading import load
from leankv_mlx.resources import demo_model

QUANTIZATION = {"group_size": 32, "bits": 4}


def quantized_demo(folder: Path) -> Path:
    """Write it to a folder of this name."""
    shutil.copytree(demo_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = load().model
    nn.quantize(model, **QUANTIZATION)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": QUANTIZATION}))
    return folder
