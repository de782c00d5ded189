"""GGUF files of every architecture and type, loaded by mlx-lm, beside what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

from leankv_mlx.errors import ModelError
from leankv_mlx.models.conversion import convert
from leankv_mlx.models.quantized import AFFINE
from tests.gguf.files import TINY, VOCAB, built, dense, gguf_weights, write

TOKENS = mx.array([[(37 * at) % VOCAB for at in range(40)]])
AGAIN = ("Q2_K", "Q3_K", "Q6_K", "IQ4_XS")


def loaded(folder: Path) -> Any:
    """mlx-lm's model of a folder, computing in float32 as ours do on a CPU."""
    model = mlx_lm_load(str(folder))[0]
    model.set_dtype(mx.float32)
    return model


def difference(one: nn.Module, other: nn.Module) -> float:
    return float(mx.abs(one(TOKENS) - other(TOKENS)).max())


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_computes_what_its_weights_say(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = built(tiny)
    write(tmp_path / "tiny.gguf", tiny, gguf_weights(tiny, model))
    convert(tmp_path / "tiny.gguf", tmp_path / "folder")
    assert difference(loaded(tmp_path / "folder"), model) < 1e-4
    assert float(mx.abs(model(TOKENS)).max()) > 1


@pytest.mark.parametrize("kind", [*AFFINE, "F16", "BF16"])
def test_types_that_map_exactly(kind: str, tmp_path: Path) -> None:
    tiny = TINY["llama"]
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    exact = write(file, tiny, gguf_weights(tiny, built(tiny)), lambda name: kind)
    convert(file, folder)
    assert difference(loaded(folder), dense(tiny, exact)) < 1e-4
    assert json.loads((folder / "config.json").read_text())["gguf"] == {"quantized_again": {}}


def off_by_steps(found: mx.array, exact: mx.array) -> float:
    """The largest error of values that have 8 bits in groups of 32, in steps of their groups."""
    groups = exact.reshape(-1, 32)
    step = mx.maximum((groups.max(axis=1) - groups.min(axis=1)) / 255, 1e-30)  # or all are alike
    return float((mx.abs(found.reshape(-1, 32) - groups) / step[:, None]).max())


@pytest.mark.parametrize("kind", AGAIN)
def test_other_types_are_quantized_again_and_say_so(kind: str, tmp_path: Path) -> None:
    tiny = TINY["llama, tied"]
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    exact = write(file, tiny, gguf_weights(tiny, built(tiny)), lambda name: kind)
    convert(file, folder)
    model, reference = loaded(folder), dict(tree_flatten(dense(tiny, exact).parameters()))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed = (layer.weight, layer.scales, layer.biases)
            assert off_by_steps(mx.dequantize(*packed, 32, 8), reference[f"{name}.weight"]) < 1
    again = json.loads((folder / "config.json").read_text())["gguf"]["quantized_again"]
    assert again == {kind: 1 + 2 * 7}


def test_types_are_mixed_tensor_by_tensor(tmp_path: Path) -> None:
    """Each layer of a file has the bits that its own tensors have, and some have none."""
    tiny = TINY["qwen2"]
    kinds = ["Q4_0", "Q5_1", "Q8_0", "F16", "Q5_K", "F32", "Q4_K"]
    made = {name: kinds[at % len(kinds)] for at, name in enumerate(gguf_weights(tiny, built(tiny)))}
    exact = write(tmp_path / "a.gguf", tiny, gguf_weights(tiny, built(tiny)), made.__getitem__)
    convert(tmp_path / "a.gguf", tmp_path / "folder")
    assert difference(loaded(tmp_path / "folder"), dense(tiny, exact)) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_dtype_for_everything(dtype: Any, tmp_path: Path) -> None:
    tiny = TINY["gemma3"]
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    kind = {"Q4_K": "Q4_K", "F16": "F16"}
    exact = write(
        file, tiny, gguf_weights(tiny, built(tiny)),
        lambda name: kind["F16" if "attn" in name else "Q4_K"],
    )  # fmt: skip
    convert(file, folder, dtype)
    stored = mx.load(str(folder / "model.safetensors"))
    assert {array.dtype for array in stored.values()} == {getattr(mx, dtype), mx.uint32}
    reference = dense(tiny, exact)
    scale = float(mx.abs(reference(TOKENS)).max())
    rounding = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    assert difference(loaded(folder), reference) < 10 * rounding * scale


def test_slabs_are_whole_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is converted at a time, the result is the same file."""
    tiny = TINY["llama"]
    write(tmp_path / "a.gguf", tiny, gguf_weights(tiny, built(tiny)), lambda name: "Q5_0")
    convert(tmp_path / "a.gguf", tmp_path / "one")
    monkeypatch.setattr("leankv_mlx.models.weights._SLAB", 1000)
    convert(tmp_path / "a.gguf", tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_tokens_that_end_a_reply(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    write(tmp_path / "a.gguf", tiny, gguf_weights(tiny, built(tiny)))
    convert(tmp_path / "a.gguf", tmp_path / "folder")
    tokenizer = mlx_lm_load(str(tmp_path / "folder"))[1]
    assert 258 in tokenizer.eos_token_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == [
        *tokenizer.encode("hi")
    ]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"general.architecture": "mamba"}, "architecture is 'mamba'; llama, qwen2, "),
        ({"general.architecture": "qwen2"}, "qwen2.embedding_length is missing"),
        ({"llama.block_count": 3}, "blk.2.attn_q.weight is missing"),
        ({"llama.block_count": 1}, "a tensor 'blk.1."),
        ({"llama.block_count": 4_000_000_000}, "llama.block_count is 4000000000"),
        ({"llama.embedding_length": 128}, "token_embd.weight has the shape"),
        ({"llama.attention.head_count": 3}, "3 query heads, 2 KV heads"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base is inf"),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1"),
        ({"llama.rope.dimension_count": 32}, "32 of 64 channels of a head are rotated"),
        ({"llama.attention.value_length": 32}, "keys and values have different sizes"),
        ({"llama.rope.scaling.type": "nosuch"}, "scaling of RoPE .'nosuch'"),
        ({"llama.rope.scaling.type": "longrope"}, "factors of RoPE are missing"),
        ({"llama.rope.scaling.type": "yarn"}, "original_context_length is missing"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"split.count": 2}, "one of several parts"),
        ({"tokenizer.ggml.tokens": ["x"] * 300}, "a token occurs twice"),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], text: str, tmp_path: Path) -> None:
    tiny = TINY["llama"]
    file = tmp_path / "tiny.gguf"
    write(file, tiny, gguf_weights(tiny, built(tiny)), more=more)
    with pytest.raises(ModelError, match=text) as caught:
        convert(file, tmp_path / "folder")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # gguf's, of what we write
def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    weights = gguf_weights(tiny, built(tiny))
    weights["blk.1.ffn_up.weight"][3, 5] = np.nan
    for kind in ("F32", "F16", "Q8_0"):
        file = tmp_path / "tiny.gguf"
        write(file, tiny, weights, lambda name, kind=kind: kind)
        with pytest.raises(ModelError, match="no numbers"):
            convert(file, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_weights_that_are_too_large_for_half_precision(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    weights = gguf_weights(tiny, built(tiny))
    weights["blk.1.ffn_up.weight"][3, 5] = 1e6
    write(tmp_path / "tiny.gguf", tiny, weights)
    with pytest.raises(ModelError, match="too large for float16"):
        convert(tmp_path / "tiny.gguf", tmp_path / "folder", "float16")
    convert(tmp_path / "tiny.gguf", tmp_path / "folder", "bfloat16")
