"""Layers whose relaid weights work together: what they compute, and when they stay mlx-lm's."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from copy import deepcopy
from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from leankv_mlx import attach
from leankv_mlx.cache import BatchedKVCache
from leankv_mlx.errors import BackendUnavailableError, ShapeError
from leankv_mlx.mlx_lm import fused, load, projecting
from leankv_mlx.mlx_lm.projecting import projections_of
from leankv_mlx.projections import Relaid, why_not_native
from leankv_mlx.projections.heads import Turn, heads, heads_ops
from leankv_mlx.projections.types import Norm
from tests.cache.harness import tokens
from tests.models import Q_HEADS, TINY, Tiny
from tests.real_models import real_model

pytestmark = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native())


KINDS: dict[str, Tiny] = {
    **{name: TINY[name] for name in ("llama", "qwen3", "gemma3")},
    "llama with biases": Tiny(
        "llama", lambda d: {"head_dim": d, "attention_bias": True, "mlp_bias": True}, (0, 1, 2)
    ),
    "llama with scaled RoPE": Tiny(
        "llama",
        lambda d: {
            "head_dim": d,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        (0, 1, 2),
    ),
    "llama with another RoPE": Tiny(
        "llama",
        lambda d: {
            "head_dim": d,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        (0, 1, 2),
    ),
    "qwen2": Tiny("qwen2", lambda d: {"hidden_size": d * Q_HEADS}, (0, 1, 2)),
    "phi3": Tiny(
        "phi3", lambda d: {"hidden_size": d * Q_HEADS, "partial_rotary_factor": 0.5}, (0, 1, 2)
    ),
}


def quantized(name: str = "llama", dtype: mx.Dtype = mx.float32) -> Any:
    model = KINDS[name](dtype=dtype)
    nn.quantize(model, 32, 4)
    return model


def run(model: Any, cached: bool = True) -> mx.array:
    """Logits of a prefill, of steps of one and of a few tokens; without a cache of the prefill."""
    caches = make_prompt_cache(model) if cached else None
    pieces = [tokens(40), *(tokens(1),) * 3, tokens(5), tokens(1)]
    outs = [model(ids[None], cache=caches) for ids in (pieces if cached else pieces[:1])]
    logits = mx.concatenate(outs, axis=1)
    mx.eval(logits)
    return logits


def close(found: mx.array, wanted: mx.array, share: float = 1e-5) -> bool:
    return bool(mx.abs(found - wanted).max() <= share * mx.abs(wanted).max())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_fused_model_computes_what_mlx_lms_does(name: str, cached: bool) -> None:
    model = quantized(name)
    wanted = run(model, cached)
    with projections_of(model, "native"):
        assert fused.count(model) == len(model.layers)
        assert close(run(model, cached), wanted)
    assert fused.count(model) == 0
    assert mx.array_equal(run(model, cached), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_beside_a_compressed_cache(name: str) -> None:
    model = quantized(name)
    with attach(model, "leankv:k8v8,projections=mlx"):
        wanted = run(model)
    with attach(model, "leankv:k8v8,projections=native") as attached:
        assert fused.count(model) == len(model.layers)
        assert close(run(model), wanted, 1e-3)  # codes of 8 bits differ where roundings do
        assert {row.attention for row in attached.report if row.compressed} == {"fused"}
        assert all(not row.reason for row in attached.projections)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama with biases", "qwen3", "gemma3"])
def test_in_half_precision_it_is_nearer_to_float32_than_mlx(name: str, dtype: mx.Dtype) -> None:
    model = quantized(name, dtype)
    plain = run(model)
    with projections_of(model, "native"):
        found = run(model)
    assert found.dtype == plain.dtype == dtype
    model.set_dtype(mx.float32)
    wanted = run(model)
    error, before = (mx.abs(x - wanted).max().item() for x in (found, plain))
    assert 0 < error < 1.2 * before


@pytest.mark.parametrize("part", ["input_layernorm", "mlp.down_proj"])
def test_parts_in_float32_make_the_rest_float32_as_in_mlx_lm(part: str) -> None:
    model = quantized(dtype=mx.float16)
    for name, module in model.named_modules():
        if name.endswith(f"1.{part}"):
            module.set_dtype(mx.float32)
    plain = run(model)
    with projections_of(model, "native"):
        found = run(model)
    assert found.dtype == plain.dtype == mx.float32
    assert close(found, plain, 0.05)


def test_several_sequences_at_once() -> None:
    model = quantized()
    ids = mx.stack([tokens(12), tokens(24)[12:]])
    wanted = model(ids)
    with projections_of(model, "native"):
        assert close(model(ids), wanted)


@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen3", "phi3"])
def test_a_step_of_a_batch_gives_the_bits_that_each_sequence_gets_alone(name: str) -> None:
    """Of sequences of other lengths, so that what one answers does not depend on the others."""
    model = quantized(name)
    with attach(model, "leankv"):
        alone = [make_prompt_cache(model) for _ in range(12)]
        for i, caches in enumerate(alone):
            mx.eval(model(tokens(3 + 17 * i)[None], cache=caches))
        batch = [BatchedKVCache.merge(layer) for layer in zip(*alone, strict=True)]
        for step in range(3):
            ids = tokens(12 + step)[-12:, None]
            together = model(ids, cache=batch)
            for i, caches in enumerate(alone):
                assert mx.array_equal(together[i], model(ids[i : i + 1], cache=caches)[0])


def test_a_batch_with_padding_on_the_left_begins_at_negative_positions() -> None:
    model = quantized()
    ids = tokens(20)
    with attach(model, "leankv"):
        wanted = model(ids[None, :14], cache=make_prompt_cache(model))[0, -1]
        batch = [BatchedKVCache.merge([cache] * 2) for cache in make_prompt_cache(model)]
        for cache in batch:
            cache.prepare(left_padding=[6, 0])
        padded = mx.stack([mx.concatenate([mx.zeros(6, ids.dtype), ids[:14]]), ids])
        assert close(model(padded, cache=batch)[0, -1], wanted)


def test_adapters_run_as_they_are_in_their_places() -> None:
    model = quantized()
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.v_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, 2, config)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(3)) / 10
    wanted = run(model)
    with projections_of(model, "native"):
        assert fused.count(model) == 3
        assert close(run(model), wanted)


def test_an_adapter_that_is_added_meanwhile() -> None:
    model = quantized()
    with projections_of(model, "native"):
        linear_to_lora_layers(model, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        for module in model.modules():
            if "lora_b" in module:
                module.lora_b = mx.ones_like(module.lora_b) / 10
        found = run(model)
        assert isinstance(model.layers[0].self_attn.q_proj.linear, Relaid)
    assert close(found, run(model))


def test_layers_of_which_one_is_dense() -> None:
    model = KINDS["llama"]()
    nn.quantize(model, 32, 4, class_predicate=lambda name, m: "layers.1.mlp" in name)
    wanted = run(model)
    with projections_of(model, "native"):
        assert fused.count(model) == 1
        assert close(run(model), wanted)


def test_a_norm_that_changes_meanwhile_counts_at_once() -> None:
    model = quantized("gemma3")
    with projections_of(model, "native"):
        run(model)
        for layer in model.layers:
            layer.input_layernorm.weight = layer.input_layernorm.weight * 3
        found = run(model)
    assert close(found, run(model))


@pytest.mark.parametrize("part", ["TransformerBlock", "Attention", "MLP"])
def test_a_class_that_computes_otherwise_stays_as_it_is(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another version of mlx-lm, or a patch of somebody else."""
    module = import_module("mlx_lm.models.qwen3")
    original = getattr(module, part).__call__

    def other(self: Any, *args: Any, **options: Any) -> mx.array:
        out: mx.array = 2 * original(self, *args, **options)
        return out

    monkeypatch.setattr(getattr(module, part), "__call__", other)
    fused.digest.cache_clear()
    model = quantized("qwen3")
    wanted = run(model)
    with projections_of(model, "native"):
        assert fused.count(model) == 0
        assert close(run(model), wanted)
    monkeypatch.undo()
    fused.digest.cache_clear()


def test_every_row_is_of_this_mlx_lm() -> None:
    """Where this fails mlx-lm has changed: read what it computes now, then write its digest."""
    for name, row in fused.ROWS.items():
        module = import_module(f"mlx_lm.models.{name}")
        assert fused.digest(module.TransformerBlock) == row.functions, name


def test_kinds_without_a_row_are_not_fused() -> None:
    for name in ("gemma2", "gpt_oss", "lfm2"):
        model = TINY[name]()
        nn.quantize(model, 32, 4)
        with projections_of(model, "native"):
            assert fused.count(model) == 0


@pytest.mark.parametrize("offset", [5000, [70, -3]], ids=str)
@pytest.mark.parametrize("length", [1, 3, 130])
@pytest.mark.parametrize("turned", [64, 48, 2])
@pytest.mark.parametrize("normed", [True, False])
def test_heads_are_normed_and_turned(
    length: int, turned: int, normed: bool, offset: int | list[int]
) -> None:
    dim = 64
    keys = mx.random.split(mx.random.key(length), 5)
    q, k = (
        mx.random.normal((2, length, n * dim), key=key)
        for n, key in zip((4, 2), keys, strict=False)
    )
    norms = tuple(Norm(mx.random.normal((dim,), key=key), 1e-6) for key in keys[2:4])
    turn = Turn(mx.exp(-mx.arange(turned // 2).astype(mx.float32) / 8), 0.5)
    given = (q, k, dim, turn, offset, norms if normed else (None, None))
    for found, wanted in zip(heads(*given), heads_ops(*given), strict=True):
        assert close(found, wanted)
    split = q.reshape(2, length, 4, dim).swapaxes(1, 2)
    if not normed:
        freqs = mx.reciprocal(turn.freqs)
        rope = mx.fast.rope(
            split, turned, traditional=False, base=None, scale=0.5, offset=mx.array(offset),
            freqs=freqs,
        )  # fmt: skip
        assert close(heads(*given).queries, rope, 1e-4)


@pytest.mark.parametrize("offsets", [[], [1, 2, 3]], ids=str)
def test_as_many_offsets_as_sequences(offsets: list[int]) -> None:
    q, k = mx.zeros((2, 1, 64)), mx.zeros((2, 1, 32))
    with pytest.raises(ShapeError):
        heads(q, k, 32, Turn(mx.ones(16)), offsets)


def test_a_copy_of_a_fused_model_computes_the_same() -> None:
    """Kind: what a layer keeps of its module cannot be copied."""
    model = quantized()
    wanted = run(model)
    with projections_of(model, "native"):
        assert close(run(model), wanted)
        copied = deepcopy(model)
        assert close(run(copied), wanted)
    assert close(run(copied), wanted)


def test_attention_that_somebody_else_put_in_place_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kind: a fused layer asks the cache itself, past whoever watches attention."""
    model, seen = quantized(), []
    with attach(model, "leankv:k8v8"):
        module = import_module("mlx_lm.models.llama")
        ours = module.scaled_dot_product_attention

        def watched(queries: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            seen.append(queries.shape)
            return ours(queries, *args, **kwargs)

        monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
        out = run(model)
        assert len(seen) == 6 * len(model.layers)
        monkeypatch.undo()
        assert mx.array_equal(run(model), out)


def test_a_model_that_is_dropped_is_gone_at_once() -> None:
    """Not with the next collection: the next model needs its memory."""
    model = quantized()
    uses = [projections_of(model, "native").start(), attach(model, "leankv").start()]
    run(model)
    uses.pop().stop()
    alive = [weakref.ref(model), weakref.ref(model.layers[0]), weakref.ref(model.layers[0].mlp)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()
    uses.pop().stop()  # nothing is left to undo


def test_products_that_do_not_run_here_are_refused_or_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projecting, "why_not_native", lambda: "no compiler.")
    model = quantized()
    with pytest.raises(BackendUnavailableError, match="native does not run here: no compiler"):
        attach(model, "leankv:projections=native")
    with attach(model, "leankv:projections=auto") as attached:
        assert attached.projections == []
        assert fused.count(model) == 0


@pytest.mark.real
@pytest.mark.parametrize("kv", ["none", "leankv:k8v8"])
def test_a_trained_model_gives_the_same_reply(kv: str) -> None:
    """Thirty tokens, each the likeliest, of the same weights: dense, and through `project`."""
    replies = []
    for setting in ("mlx", "native"):
        loaded = load(real_model("smollm2"), projections=setting)
        prompt = loaded.tokenizer.encode(
            "The capital of France is Paris. The largest city in Italy"
        )
        with nullcontext() if kv == "none" else attach(loaded.model, f"{kv},projections={setting}"):
            steps = generate_step(mx.array(prompt), loaded.model, max_tokens=30)
            replies.append([token for token, _ in steps])
        assert fused.count(loaded.model) == (30 if setting == "native" else 0)
    assert replies[0] == replies[1]
    assert len(set(replies[0])) > 5
