"""Attaching to models of every kind: what is replaced, what is reported, and the exact undo."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

import leankv_mlx
from leankv_mlx import CompressedKVCache, CompressionConfig
from leankv_mlx.errors import ConfigError, ModelError, UnsupportedError
from leankv_mlx.mlx_lm import Attachment, attach, measure
from tests.cache.prompt_files import content, one_of_each
from tests.models import TINY, VOCAB

TOKENS = mx.array([[i * 7 % VOCAB for i in range(150)]])
SDPA = "scaled_dot_product_attention"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"]()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return TINY["qwen3"]()


def state_of(*models: nn.Module) -> list[Any]:
    """Everything that attaching changes, by identity."""
    modules: list[ModuleType] = [sys.modules[type(m).__module__] for m in models]
    return [
        *(dict(vars(m)) for m in models),
        *(list(m) for m in models),
        *(id(vars(module)[SDPA]) for module in modules),
        *(list(vars(module)) for module in modules),
    ]


def classes(model: nn.Module) -> list[str]:
    return [type(entry).__name__ for entry in make_prompt_cache(model)]


def run(model: nn.Module, tokens: mx.array = TOKENS) -> tuple[mx.array, list[Any]]:
    """Logits of a prefill and two decode steps, [1, 3, VOCAB], and the caches."""
    caches = make_prompt_cache(model)
    logits = [model(tokens, cache=caches)[:, -1:]]
    logits += [model(mx.array([[token]]), cache=caches) for token in (3, 5)]
    return mx.concatenate(logits, axis=1), caches


@pytest.mark.parametrize("name", TINY)
def test_the_report_tells_what_is_compressed_and_why_the_rest_is_not(name: str) -> None:
    tiny = TINY[name]
    model = tiny()
    own = classes(model)
    with attach(model, "leankv:k8v8") as attached:
        _, caches = run(model)
        rows = attached.report
    assert [row.cache for row in rows] == own
    assert tuple(row.index for row in rows if row.compressed) == tiny.compressed
    assert [isinstance(c, CompressedKVCache) for c in caches] == [row.compressed for row in rows]
    for row in rows:
        assert row.reason
        assert row.attention == (["fallback", "fused"][tiny.fused] if row.compressed else "")
    assert attached.report == rows  # after the end as well
    assert attached.compressed_layers == len(tiny.compressed)
    assert classes(model) == own


@pytest.mark.parametrize("name", TINY)
def test_the_logits_stay_close_at_8_bits(name: str) -> None:
    model = TINY[name]()
    plain, _ = run(model)
    with attach(model, "leankv:k8v8"):
        compressed, _ = run(model)
    assert mx.abs(plain - compressed).max().item() < 0.3
    assert mx.array_equal(run(model)[0], plain)


def test_a_model_without_a_compressible_layer_runs_as_before() -> None:
    model = TINY["deepseek_v3"]()
    plain, _ = run(model)
    with attach(model) as attached:
        same, _ = run(model)
        assert attached.compressed_layers == 0
        assert all("latent" in row.reason for row in attached.report)
    assert mx.array_equal(plain, same)


def test_attach_is_a_public_name_and_takes_a_config(model: nn.Module) -> None:
    with leankv_mlx.attach(model, CompressionConfig(k_bits=3)) as attached:
        assert attached.config.k_bits == 3
        assert attached.report[0].reason == "leankv:k3v4"


def test_importing_and_creating_change_nothing(model: nn.Module) -> None:
    before = state_of(model)
    attach(model)
    assert state_of(model) == before


def test_an_exception_inside_undoes_too(model: nn.Module) -> None:
    before = state_of(model)

    def fail() -> None:
        assert state_of(model) != before
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), attach(model):
        fail()
    assert state_of(model) == before


def test_the_same_attachment_can_be_used_again_and_within_itself(model: nn.Module) -> None:
    before = state_of(model)
    attached = attach(model)
    for _ in range(2):
        with attached, attached:
            assert "CompressedKVCache" in classes(model)
        assert state_of(model) == before
    attached.stop()  # one too many
    assert state_of(model) == before


def test_nested_attachments_use_the_last_one_that_is_active(model: nn.Module) -> None:
    outer, inner = attach(model, "leankv:k8v8"), attach(model, "leankv:k2v2")
    with outer:
        with inner:
            assert make_prompt_cache(model)[0].config.k_bits == 2
        assert make_prompt_cache(model)[0].config.k_bits == 8
    outer.start()
    inner.start()
    outer.stop()
    assert make_prompt_cache(model)[0].config.k_bits == 2
    inner.stop()
    assert type(make_prompt_cache(model)[0]) is KVCache


def test_an_own_make_cache_on_the_instance_comes_back() -> None:
    model = TINY["llama"]()

    def mine() -> list[KVCache]:
        return [KVCache() for _ in model.layers]

    model.make_cache = mine
    with attach(model) as attached:
        assert attached.compressed_layers == 3
        assert "CompressedKVCache" in classes(model)
    assert model.make_cache is mine


def test_a_patch_on_top_of_ours_survives(model: nn.Module) -> None:
    attached = attach(model).start()
    ours = getattr(llama, SDPA)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    try:
        setattr(llama, SDPA, theirs)
        attached.stop()
        assert getattr(llama, SDPA) is theirs
        plain, _ = run(model)
        with attach(model, "leankv:k8v8") as again:
            run(model)
            assert again.report[0].attention == "fused"
        assert getattr(llama, SDPA) is theirs
        assert mx.array_equal(run(model)[0], plain)
    finally:
        setattr(llama, SDPA, mlx_lm_sdpa())


def mlx_lm_sdpa() -> Any:
    from mlx_lm.models import base

    return getattr(base, SDPA)


def test_modules_start_and_end_with_the_function_of_mlx_lm(
    model: nn.Module, other: nn.Module
) -> None:
    same = TINY["llama"]()
    with attach(model):
        with attach(other), attach(same):
            assert getattr(qwen3, SDPA) is not mlx_lm_sdpa()
        assert getattr(qwen3, SDPA) is mlx_lm_sdpa()
        assert getattr(llama, SDPA) is not mlx_lm_sdpa()
    assert getattr(llama, SDPA) is mlx_lm_sdpa()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exits_in_any_order_leave_everything_as_it_was(data: st.DataObject) -> None:
    models = [_MODELS[i] for i in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))]
    before = state_of(*_MODELS)
    waiting = [attach(m) for m in models]
    running: list[Attachment] = []
    try:
        while waiting or running:
            if waiting and (not running or data.draw(st.booleans())):
                running.append(waiting.pop().start())
            else:
                running.pop(data.draw(st.integers(0, len(running) - 1))).stop()
            for m in _MODELS:
                active = any(attached.model is m for attached in running)
                assert (type(make_prompt_cache(m)[0]) is CompressedKVCache) == active
    finally:
        for attached in running:
            attached.stop()
    assert state_of(*_MODELS) == before


_MODELS = [TINY["llama"](), TINY["llama"](), TINY["qwen3"]()]


def test_two_models_are_independent(model: nn.Module, other: nn.Module) -> None:
    plain, _ = run(other)
    with attach(model, "leankv:k2v2"):
        assert mx.array_equal(run(other)[0], plain)
        with attach(other, "leankv:k8v8"):
            assert make_prompt_cache(model)[0].config.k_bits == 2
            assert make_prompt_cache(other)[0].config.k_bits == 8


def test_a_plain_cache_works_while_attached(model: nn.Module) -> None:
    plain, _ = run(model)
    with attach(model):
        caches = [KVCache() for _ in model.layers]
        logits = model(TOKENS, cache=caches)[:, -1]
    assert mx.array_equal(logits, plain[:, 0])


def test_errors_have_types(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="unknown KV setting"):
        attach(model, "nosuch")
    with pytest.raises(ModelError, match="neither make_cache nor layers"):
        attach(nn.Linear(2, 2))
    with attach(model), pytest.raises(UnsupportedError):
        model(mx.zeros((2, 4), dtype=mx.int32), cache=make_prompt_cache(model))


def test_saved_prompt_caches_find_the_class(model: nn.Module, tmp_path: Any) -> None:
    with attach(model):
        _, caches = run(model)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, caches)
    assert mlx_lm_cache.CompressedKVCache is CompressedKVCache  # type: ignore[attr-defined]
    loaded = load_prompt_cache(file)
    assert measure(loaded) == measure(caches)


def test_the_state_of_an_earlier_version_is_one_list(model: nn.Module) -> None:
    """As mlx-lm's own files have it."""
    for cache in one_of_each():
        if not isinstance(cache, CompressedKVCache) or (layer := cache.state.layer) is None:
            continue
        if cache.learned is not None:
            continue  # there were no masks, and no bases
        old: list[Any] = [*cache.state[:2], *layer[:4], *layer.exact]
        if layer.body is not None:
            tiers = [[x for x in tier if x is not None] for tier in layer.body.tiers]
            scales = layer.body.key_scales
            old += [*layer.body.centers, tiers, *([] if scales is None else [scales])]
        again = CompressedKVCache.from_state(old)
        assert content(again) == content(cache)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "deepseek_v3"])
def test_usage_counts_the_same_layers_on_both_sides(name: str) -> None:
    model = TINY[name](dtype=mx.float16)
    _, plain = run(model)
    usage = measure(plain)
    assert usage.tokens == TOKENS.shape[1] + 2
    assert usage.used == usage.fp16 > 0
    assert usage.allocated >= usage.used
    with attach(model):
        _, caches = run(model)
    compressed = measure(caches)
    assert compressed.fp16 == usage.fp16
    assert (compressed.ratio > 1) == bool(TINY[name].compressed)


def test_usage_of_quantized_caches(model: nn.Module) -> None:
    _, caches = run(model)
    before = measure(caches)
    after = measure([cache.to_quantized(group_size=64, bits=4) for cache in caches])
    assert after.fp16 == before.fp16
    assert after.tokens == before.tokens
    assert 1.8 < after.ratio < 4  # fp32 scales and biases
