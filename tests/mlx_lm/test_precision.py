"""16-bit weights that compute in float32 on the CPU, and the 16-bit rows that go with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config, save_model

from leankv_mlx import attach
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.evaluation.demo import run_demo
from leankv_mlx.mlx_lm import LoadedModel, load
from leankv_mlx.mlx_lm.attachment import make_caches, own_caches
from leankv_mlx.mlx_lm.footprint import Footprint, weight_bytes
from leankv_mlx.mlx_lm.machine import on_cpu
from leankv_mlx.mlx_lm.precision import compute_in_float32, float32_bytes, weights_dtype
from leankv_mlx.mlx_lm.usage import measure
from leankv_mlx.projections import Relaid, is_attached, why_not_native
from leankv_mlx.resources import demo_model
from tests.cache.harness import feed, relative, tokens
from tests.models import TINY

native = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native())

pytestmark = pytest.mark.skipif(not on_cpu(), reason="MLX computes on another device")

HALF = [mx.float16, mx.bfloat16]


def quantized(name: str = "llama", dtype: mx.Dtype = mx.float16, bits: int = 4) -> nn.Module:
    mx.random.seed(0)  # some models draw biases when they are made
    model = TINY[name](dtype=dtype)
    nn.quantize(model, 32, bits)
    return model


def by_hand(model: nn.Module) -> nn.Module:
    """The same weights in float32, still quantized where they were."""
    model.set_dtype(mx.float32)
    return model


def dtypes(model: nn.Module) -> set[mx.Dtype]:
    flat: Any = tree_flatten(model.parameters())
    return {array.dtype for _, array in flat}


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def logits(model: nn.Module, ids: mx.array) -> Any:
    return feed(model, make_caches(model), [ids])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss", "qwen3_next"])
def test_the_logits_are_those_of_the_same_weights_in_float32(
    name: str, dense: bool, dtype: mx.Dtype
) -> None:
    model, ids = quantized(name, dtype), tokens(40)
    compute_in_float32(model, dense_bytes=None if dense else 0)
    assert not dtypes(model) & set(HALF)
    wanted = logits(by_hand(quantized(name, dtype)), ids)
    found = logits(model, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).all()


def test_small_models_become_dense_and_large_ones_stay_quantized() -> None:
    model = quantized(bits=3)
    size = float32_bytes(model)
    compute_in_float32(model, dense_bytes=size - 1)
    assert kinds(model) >= {"QuantizedLinear", "QuantizedEmbedding"}
    assert dtypes(model) == {mx.float32, mx.uint32}
    compute_in_float32(model, dense_bytes=size)
    assert not kinds(model) & {"QuantizedLinear", "QuantizedEmbedding"}
    assert dtypes(model) == {mx.float32}
    assert weight_bytes(model) == size
    assert not model.trainable_parameters().get("lm_head")


def test_a_layer_that_stands_in_two_places_stays_one() -> None:
    model = quantized()
    first, second, *_ = model.layers
    second.mlp = first.mlp
    compute_in_float32(model)
    assert second.mlp.up_proj is first.mlp.up_proj
    assert type(first.mlp.up_proj) is nn.Linear


def test_biases_and_modes_without_float_scales() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=True)
            self.b = nn.Linear(64, 32, bias=False)

        def __call__(self, x: mx.array) -> mx.array:
            return self.b(self.a(x))

    model = Pair()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, mode="mxfp4")
    x = mx.random.normal((3, 64))
    wanted = by_hand_of(model)(x)
    compute_in_float32(model)
    assert type(model.a) is nn.Linear and dtypes(model) == {mx.float32}
    assert mx.allclose(model(x), wanted, atol=1e-5)


def by_hand_of(model: nn.Module) -> Callable[[mx.array], mx.array]:
    weights = []
    for layer in (model.a, model.b):
        w = mx.dequantize(
            layer.weight, layer.scales, None, layer.group_size, layer.bits, layer.mode
        )
        weights.append((w.astype(mx.float32), layer.get("bias")))

    def run(x: mx.array) -> mx.array:
        for w, bias in weights:
            x = x @ w.T + (0 if bias is None else bias.astype(mx.float32))
        return x

    return run


def with_adapters() -> nn.Module:
    model = quantized()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    for module in model.modules():
        if "lora_b" in module:
            for name, seed in (("lora_a", 1), ("lora_b", 2)):
                module[name] = mx.random.normal(module[name].shape, key=mx.random.key(seed)) / 10
    return model


def test_adapters_stay_where_they_are() -> None:
    model, ids = with_adapters(), tokens(40)
    adapters = {name for name in kinds(model) if "LoRA" in name}
    compute_in_float32(model)
    assert {name for name in kinds(model) if "LoRA" in name} == adapters != set()
    wanted = logits(by_hand(with_adapters()), ids)
    assert np.abs(logits(model, ids) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(logits(by_hand(quantized()), ids) - wanted).max() > 0.01 * np.abs(wanted).max()


def test_the_note_is_no_parameter() -> None:
    model = quantized(dtype=mx.bfloat16)
    before = set(model.keys())
    compute_in_float32(model)
    assert weights_dtype(model) == mx.bfloat16
    assert set(model.keys()) == before
    assert weights_dtype(deepcopy(model)) == mx.bfloat16
    assert weights_dtype(quantized()) is None


def test_float32_models_are_unpacked_and_no_more() -> None:
    model = quantized(dtype=mx.float32)
    compute_in_float32(model)
    assert dtypes(model) == {mx.float32}
    assert weights_dtype(model) is None


def test_the_user_can_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANKV_PRECISION", "file")
    model = quantized()
    compute_in_float32(model)
    assert mx.float16 in dtypes(model)
    assert weights_dtype(model) is None


# A model in a folder.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 4 bits and half precision."""
    target = tmp_path_factory.mktemp("quantized")
    loaded = load()
    for file in demo_model().iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, target)
    model, config = loaded.model, json.loads((demo_model() / "config.json").read_text())
    model.set_dtype(mx.float16)
    nn.quantize(model, 32, 4)
    save_model(target, model)
    save_config(config | {"quantization": {"group_size": 32, "bits": 4}}, target / "config.json")
    return target


def test_loading_a_folder_makes_it_compute_in_float32(folder: Path) -> None:
    model = load(folder, projections="mlx").model
    assert dtypes(model) == {mx.float32}
    assert weights_dtype(model) == mx.float16


@native
def test_what_is_projected_stays_quantized_and_computes_the_same(folder: Path) -> None:
    dense, projected = (load(folder, projections=name).model for name in ("mlx", "native"))
    assert is_attached(projected) and not is_attached(dense)
    assert dtypes(projected) == {mx.float32, mx.uint32}
    assert weights_dtype(projected) == mx.float16
    assert {m.relaid().scales.dtype for m in projected.modules() if isinstance(m, Relaid)} == {
        mx.float16
    }
    assert weight_bytes(projected) < 0.3 * weight_bytes(dense)
    ids = tokens(40)
    found, wanted = logits(projected, ids), logits(dense, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    with attach(projected, "leankv:projections=mlx"):
        assert not is_attached(projected)
        assert (
            np.abs(feed(projected, own_caches(projected), [ids]) - wanted).max()
            < 1e-4 * np.abs(wanted).max()
        )
    assert is_attached(projected)


def test_what_is_not_projected_becomes_dense() -> None:
    model = with_adapters()
    compute_in_float32(model, projected=True)
    assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear
    assert type(model.layers[2].self_attn.q_proj.linear) is nn.Linear


def test_documents_are_kept_for_what_the_model_computes_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = CompressionConfig(), DocumentCache(place=tmp_path / "documents")
    prefix = [1, *range(10, 200)]

    def opened(loaded: LoadedModel) -> bool:
        return Opener(loaded, config, store).open(prefix, "it", lambda *_: None).cached

    in_float32 = load(folder)
    assert [opened(in_float32), opened(in_float32)] == [False, True]
    monkeypatch.setenv("LEANKV_PRECISION", "file")
    as_stored = load(folder)
    assert [opened(as_stored), opened(as_stored)] == [False, True]
    monkeypatch.delenv("LEANKV_PRECISION")
    assert opened(load(folder))


def test_the_demo_compares_with_16_bits(folder: Path) -> None:
    shown = run_demo(str(folder), CompressionConfig(), 300, 1)
    plain, compressed = (arm.usage for arm in shown.arms)
    assert plain.used == 2 * plain.fp16  # mlx-lm's own cache of a model in float32
    assert shown.ratio == plain.fp16 / compressed.used
    assert "x smaller than in 16 bits" in shown.conclusion


def test_a_lazy_load_reads_no_weights(folder: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    model = load(folder, lazy=True).model
    assert dtypes(model) <= {mx.float32, mx.uint32}
    assert mx.get_active_memory() - before < 10**6


def test_the_bundled_model_stays_as_it_is() -> None:
    model = load().model
    assert dtypes(model) == {mx.bfloat16}
    assert weights_dtype(model) is None


# The cache of such a model.


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_exact_rows_have_the_dtype_of_the_weights(dtype: mx.Dtype) -> None:
    model = quantized(dtype=dtype)
    compute_in_float32(model)
    with attach(model, "leankv:k8v8,window=32,sink_tokens=4"):
        caches = make_caches(model)
        for size in (20, 3, 150, 1, 1):
            out = model(tokens(size)[None], cache=caches)
            mx.eval(out)
            assert out.dtype == mx.float32
            assert {x.dtype for c in caches for x in c.layer.exact} == {dtype}
            assert {x.dtype for x in caches[0].keys_and_values()} == {mx.float32}
        caches[0].trim(160)
        assert caches[0].layer.exact.k.dtype == dtype


@pytest.mark.parametrize("kv", ["leankv", "leankv:equalize=on", "leankv:policy=budget,ratio=6"])
@pytest.mark.parametrize("size", [8, 30, 90, 700])
def test_a_short_chat_takes_no_more_than_fp16(kv: str, size: int) -> None:
    model = quantized()
    compute_in_float32(model)
    with attach(model, kv) as attachment:
        caches = make_caches(model)
        mx.eval(model(tokens(size)[None], cache=caches))
        usage = measure(caches)
        if "budget" not in kv:  # which counts the queries that it remembers, too
            assert usage.ratio >= 1
        assert Footprint.of(model, attachment).used(size) == usage.used - sum(
            c.memory().side for c in caches
        )


@pytest.mark.parametrize(("dtype", "allowed"), [(mx.float16, 0.01), (mx.bfloat16, 0.03)], ids=str)
def test_16_bit_rows_change_next_to_nothing(dtype: mx.Dtype, allowed: float) -> None:
    """Beside float32 rows, over prefills, decode calls and flushes. (A random model amplifies any
    rounding: computing in fp16 moves its logits by 0.4%.)"""
    model, ids = quantized(dtype=dtype), tokens(260)
    compute_in_float32(model)
    pieces = [ids[:150], ids[150:157], *(ids[i : i + 1] for i in range(157, 200)), ids[200:]]
    with attach(model, "leankv:k8v8,window=32"):
        found = feed(model, make_caches(model), pieces)
    plain = by_hand(quantized(dtype=dtype))
    with attach(plain, "leankv:k8v8,window=32"):
        wanted = feed(plain, make_caches(plain), pieces)
    assert 0 < relative(found, wanted) < allowed
