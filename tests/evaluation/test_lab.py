"""The quality lab on the demo model, with settings as small as they can be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError, ContextLengthError, ModelError, UsageError
from leankv_mlx.evaluation import fidelity as fidelity_module
from leankv_mlx.evaluation import lab as lab_module
from leankv_mlx.evaluation.arms import DEFAULT_KV, Arm, Size, in_float32, parse_arms
from leankv_mlx.evaluation.fidelity import Chunk, Corpus, corpus, generated_text, run_fidelity
from leankv_mlx.evaluation.lab import Lab, Report, Settings
from leankv_mlx.evaluation.metrics import log_probabilities
from leankv_mlx.evaluation.retrieval import Cell, Retrieval, cells_of, run_retrieval
from leankv_mlx.evaluation.stress import STRESSES, Stress, injected
from leankv_mlx.evaluation.tables import tables
from leankv_mlx.kernels import encode as encode_module
from leankv_mlx.mlx_lm import LoadedModel, load, make_caches
from leankv_mlx.mlx_lm.reading import prefill
from tests.models import TINY

CONTEXT = 256
KV = ("k4v4", "k2v2")
TINY_SETTINGS = Settings(
    kv=KV, tasks=("S2",), lengths=(200,), samples=1, context=CONTEXT, chunks=1
)  # fmt: skip
ARM_KEYS = {
    "retrieval_ratio",
    "pairs",
    "kv",
    "bits_per_element",
    "body_bits",
    "ratio",
    "tokens",
    "kld",
    "kld_error",
    "top1",
    "top1_error",
    "ppl",
    "ppl_base",
    "ln_ratio",
    "ln_ratio_error",
    "bits_per_byte",
    "retrieval",
}


def ignore(what: str, tokens: int) -> None:
    pass


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture(scope="module")
def report() -> Report:
    done: list[int] = []
    lab = Lab(None, TINY_SETTINGS)
    progress = lab_module.Progress(done.append, lambda what, tokens: done.append(tokens))
    found = lab.run(progress)
    assert done[0] == lab.work == sum(done[1:])
    return found


def check_document(document: dict[str, Any], names: list[str]) -> None:
    assert set(document) == {"model", "machine", "arms"}
    assert [arm["kv"] for arm in document["arms"]] == names
    for arm in document["arms"]:
        assert set(arm) == ARM_KEYS
        assert list(arm["kld"]) == ["mean", "p50", "p90", "p99", "p999", "max"]
        assert 0 <= arm["top1"] <= 1
        for by_length in arm["retrieval"].values():
            assert all(0 <= score <= 1 for score in by_length.values())
    none = document["arms"][0]
    assert set(none["kld"].values()) == {0.0}
    assert (none["ratio"], none["bits_per_element"], none["top1"]) == (1.0, 16.0, 1.0)
    assert none["ppl"] == none["ppl_base"]


def test_the_document_has_its_form(report: Report) -> None:
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    check_document(document, ["none", *KV])
    assert document["arms"][0]["retrieval"].keys() == {"S2"}


def test_fewer_bits_cost_more(report: Report) -> None:
    none, four, two = report.arms
    assert 0 < four.fidelity.kld["mean"] < two.fidelity.kld["mean"]
    assert none.size.ratio < four.size.ratio < two.size.ratio
    assert four.fidelity.kld["mean"] <= 0.01


def test_tables_tell_the_same(report: Report) -> None:
    grids = tables(report)
    assert [grid.title.split(",")[0] for grid in grids][:2] == ["Fidelity", "Retrieval"]
    for grid in grids:
        assert all(len(row) == len(grid.header) for row in grid.rows)
    assert [row[0] for row in grids[0].rows] == ["none", *KV]


def test_arms_are_named_as_asked_and_none_comes_first() -> None:
    assert [arm.kv for arm in parse_arms([])] == ["none", *DEFAULT_KV]
    arms = parse_arms(["leankv:k4v3", "k4v3", "none", "leankv", "k8v8,window=128"])
    assert [arm.kv for arm in arms] == ["none", "k4v3", "leankv", "k8v8,window=128"]
    assert arms[2].config == CompressionConfig()
    with pytest.raises(ConfigError):
        parse_arms(["k5v5"])


def test_bytes_are_those_of_the_buffers(loaded: LoadedModel) -> None:
    with in_float32(loaded.model), Arm.parse("k4v4").attached(loaded.model):
        caches = make_caches(loaded.model)
        prefill(loaded.model, range(CONTEXT), caches)
        found = Size.of(caches)
    exact = 4 + 64 + (CONTEXT - 68) % 32
    layers, heads, dim, blocks = 5, 2, 64, (CONTEXT - exact) // 32
    codes = blocks * heads * (32 * dim * 2 * 4 // 8 + 32 * 4)
    rows = exact * heads * dim * 2 * 2
    expected = codes + rows + heads * dim * 2 * 4  # and the float32 centers
    elements = CONTEXT * heads * dim * 2
    assert found.bits_per_element == pytest.approx(8 * expected / elements, rel=0.02)  # and tables
    assert found.body_bits == 4 + 16 / dim  # a scale of 16 bits for each vector
    assert found.ratio == pytest.approx(16 / found.bits_per_element)
    assert layers == len(load().model.layers)


def test_calls_of_any_size_score_what_single_steps_score(loaded: LoadedModel) -> None:
    """So scoring in calls of 32 is what token-by-token decoding would give."""
    arms, texts = parse_arms(["k3v3"]), corpus(loaded, None, 216, 1)
    single, eight, call = (
        run_fidelity(loaded, arms, texts, ignore, step=step)["k3v3"] for step in (1, 8, 32)
    )
    assert single.kld["mean"] > 1e-4
    for other in (eight, call):
        assert other.kld["mean"] == pytest.approx(single.kld["mean"], rel=1e-3)
        assert other.kld["p99"] == pytest.approx(single.kld["p99"], rel=1e-3)


def test_arms_that_are_read_together_score_what_they_score_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their calls, and with the base read again for each of them; a call or two of the
    base is all that is held."""
    texts = corpus(loaded, None, 300, 1)
    arms = parse_arms(["k4v4", "k3v3,window=80", "policy=streaming"])
    held: list[int] = []
    rows = fidelity_module._Base.rows

    def watched(self: Any, first: int, end: int) -> mx.array:
        found = rows(self, first, end)
        held.append(sum(part.shape[0] for _, part in self._rows))
        return found

    monkeypatch.setattr(fidelity_module._Base, "rows", watched)
    done: list[int] = []
    together = run_fidelity(loaded, arms, texts, lambda what, tokens: done.append(tokens))
    assert max(held) <= 2 * fidelity_module.STEP < 150  # of the 150 that are scored
    monkeypatch.setattr(fidelity_module, "_TOGETHER", 1)
    alone = run_fidelity(loaded, arms, texts, lambda what, tokens: done.append(tokens))
    assert sum(done) == 2 * len(arms) * texts.work
    assert together == alone
    assert all(found.tokens == 150 for found in alone.values())


def test_layers_with_a_sliding_window_stay_as_they_are() -> None:
    """As in Gemma: the base is the model without a cache, and the body's bits are those of the
    layers that are compressed."""
    model = TINY["gemma3"]()
    ids = mx.random.randint(0, 128, (401,), key=mx.random.key(2))
    plain = LoadedModel(model, SimpleNamespace(), {}, Path("tiny"))
    texts = Corpus((Chunk(ids[:-1], ids[1:]),), (1,))
    sizes: dict[str, Size] = {}
    found = run_fidelity(plain, parse_arms(["k8v8", "k2v2"]), texts, ignore, sizes=sizes)
    nll = -log_probabilities(model(ids[None, :-1])[0])[200:][mx.arange(200), ids[201:]]
    assert found["none"].ppl_base == pytest.approx(np.exp(nll.mean().item()), rel=1e-4)
    assert 0 < found["k8v8"].kld["mean"] < found["k2v2"].kld["mean"]
    assert sizes["none"].bits_per_element == 16 and sizes["none"].body_bits == 0
    assert sizes["k2v2"].body_bits == 2 + 16 / 64 and sizes["k2v2"].bits_per_element > 2.5


def test_the_base_is_the_model_without_a_cache(loaded: LoadedModel) -> None:
    texts = corpus(loaded, None, CONTEXT, 1)
    found = run_fidelity(loaded, parse_arms(["k8v8"])[:1], texts, ignore)["none"]
    (chunk,) = texts.chunks
    with in_float32(loaded.model):
        logits = np.array(loaded.model(chunk.tokens[None])[0])[CONTEXT // 2 :].astype(np.float64)
    targets = np.array(chunk.targets)[CONTEXT // 2 :]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
    assert found.ppl_base == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    assert found.tokens == CONTEXT // 2


def test_chunks_begin_with_bos_and_do_not_overlap(loaded: LoadedModel) -> None:
    text = generated_text(4000)
    texts = corpus(loaded, text, 300, 2)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    inputs = [chunk.tokens.tolist() for chunk in texts.chunks]
    assert all(row[0] == loaded.tokenizer.bos_token_id for row in inputs)
    assert [*inputs[0][1:], texts.chunks[0].targets[-1].item()] == ids[:300]
    assert inputs[1][1:] == ids[300:599]
    assert texts.chunks[1].tokens[1:].tolist() == texts.chunks[1].targets[:-1].tolist()


def test_too_little_text_or_context_is_told(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="give a longer text"):
        corpus(loaded, "Short.", 300, 1)
    with pytest.raises(UsageError, match="use --context 200 or more"):
        run_fidelity(loaded, parse_arms(["k4v4"]), corpus(loaded, None, 198, 1), ignore)
    with pytest.raises(UsageError, match="--samples 0"):
        Lab(None, replace(TINY_SETTINGS, samples=0))
    with pytest.raises(UsageError, match="unknown task XY"):
        Lab(None, replace(TINY_SETTINGS, tasks=("XY",)))


def test_a_chunk_may_fill_the_models_context(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(loaded, config={**loaded.config, "max_position_embeddings": CONTEXT})
    monkeypatch.setattr(lab_module, "load", lambda model: short)
    assert Lab(None, TINY_SETTINGS).corpus.context == CONTEXT
    with pytest.raises(ContextLengthError, match=f"context {CONTEXT}"):
        Lab(None, replace(TINY_SETTINGS, context=CONTEXT + 1))


def test_a_broken_cache_shows(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong codes must not go unnoticed: the metrics see what attention sees."""
    arms, texts = parse_arms(["k8v8"]), corpus(loaded, None, 216, 1)
    good = run_fidelity(loaded, arms, texts, ignore)["k8v8"]
    original = encode_module.encode

    def encode(rows: Any, centers: Any, format: Any, *how: Any) -> mx.array:
        words = original(rows, centers, format, *how)
        return mx.where(mx.arange(words.shape[-1]) % 64 == 0, words ^ 0xFF, words)

    monkeypatch.setattr("leankv_mlx.cache.body.encode", encode)
    bad = run_fidelity(loaded, arms, texts, ignore)["k8v8"]
    assert good.kld["mean"] < 1e-3
    assert bad.kld["mean"] > 20 * good.kld["mean"]


def test_the_model_is_the_same_after_float32(loaded: LoadedModel) -> None:
    before = dict(tree_flatten(loaded.model.parameters()))
    with in_float32(loaded.model):
        assert all(a.dtype == mx.float32 for _, a in tree_flatten(loaded.model.parameters()))
    for name, array in tree_flatten(loaded.model.parameters()):
        assert array.dtype == before[name].dtype and mx.array_equal(array, before[name])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_outliers_keep_the_function_and_end_with_the_block(name: str) -> None:
    model = TINY[name]()
    ids = mx.random.randint(0, 128, (60,), key=mx.random.key(0))
    before = model(ids[None])
    for stress in STRESSES:
        with injected(model, stress, ids):
            inside = model(ids[None])
        change = mx.abs(inside - before).max().item()
        assert change < 1e-4 if stress.kind == "outliers" else change > 1e-4
    assert mx.array_equal(model(ids[None]), before)


def test_outliers_reach_the_cache(loaded: LoadedModel) -> None:
    with injected(loaded.model, Stress("outliers", 2, 100.0), mx.arange(50)):
        caches = make_caches(loaded.model)
        loaded.model(mx.arange(50)[None], cache=caches)
        rms = np.array(mx.sqrt(caches[0].keys[0, :, :50].astype(mx.float32).square().mean(1)))
    assert ((rms > 10 * np.median(rms, axis=1, keepdims=True)).sum(axis=1) == 4).all()


def test_retrieval_compares_only_where_the_base_is_able() -> None:
    able, unable = Cell("S1", 100), Cell("S2", 100)
    scores = {
        "none": {able: [1.0, 1.0, 1.0, 1.0, 0.5], unable: [0.0, 1.0, 0.0, 0.0, 0.0]},
        "k2v2": {able: [1.0, 0.0, 1.0, 1.0, 1.0], unable: [1.0] * 5},
    }
    found = Retrieval(scores, "none", {})
    assert found.solved() == [able]
    pairs = found.pairs("k2v2", [able])
    assert (pairs.both, pairs.only_base, pairs.only_arm, pairs.neither) == (3, 1, 1, 0)
    both = found.pairs("k2v2", [able, unable])
    assert (both.both, both.only_base, both.only_arm, both.neither) == (4, 1, 5, 0)
    assert both.p_value == pytest.approx(2 * (1 + 6) / 2**6)
    assert found.pairs("none", [able]).p_value == 1
    assert found.means("k2v2") == {"S1": {"100": 0.8}, "S2": {"100": 1.0}}


def test_every_arm_gets_the_same_prompts(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def answer(loaded: LoadedModel, prompt: Any) -> tuple[str, float]:
        asked.append(tuple(prompt.tokens))
        return prompt.sample.reply, 1.0

    monkeypatch.setattr("leankv_mlx.evaluation.retrieval._answer", answer)
    cells = cells_of(["S2", "MV"], [250])
    found = run_retrieval(loaded, parse_arms(["k4v4"]), cells, 2, ignore)
    assert asked[::2] == asked[1::2] and len(set(asked)) == 4
    assert all(len(tokens) <= 250 for tokens in asked)
    assert found.means("none") == {"S2": {"250": 1.0}, "MV": {"250": 1.0}}


def test_retrieval_needs_a_chat_template(loaded: LoadedModel) -> None:
    plain = replace(loaded, tokenizer=SimpleNamespace(has_chat_template=False))
    with pytest.raises(ModelError, match="use --tasks none"):
        run_retrieval(plain, parse_arms(["k4v4"]), cells_of(["S2"], [250]), 1, ignore)


def test_a_model_without_a_layer_to_compress_is_told() -> None:
    model = TINY["deepseek_v3"]()
    with (
        pytest.raises(ModelError, match="nothing to compress"),
        Arm.parse("k4v4").attached(model),
    ):
        pass


def test_stress_and_ablation_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_module, "STRESSES", STRESSES[1:2])
    monkeypatch.setattr(lab_module, "ABLATED", ("k4v4",))
    monkeypatch.setattr(lab_module, "ABLATIONS", lab_module.ABLATIONS[:1])
    kv = ("k4v4,equalize=off", "k4v4")
    settings = replace(TINY_SETTINGS, kv=kv, tasks=(), ablate=True, stress=True)
    found = Lab(None, replace(settings, context=216)).run()
    document = found.as_dict()
    names = [arm["kv"] for arm in document["ablation"]]
    assert names == ["k4v4", "k4v4,rotation=none"]
    (part,) = document["stress"]
    assert part["stress"] == "outliers: 2 pairs x30"
    none, plain, equalized = (arm["kld"]["mean"] for arm in part["arms"])
    assert none == 0 and 10 * equalized < plain
    *_, table = tables(found)
    assert table.header[-2:] == ("outliers: 2 pairs x30", "worst")
    assert [(row[0], row[-1]) for row in table.rows] == [
        (kv[0], f"{plain:.5f}"), (kv[1], f"{equalized:.5f}"),
    ]  # fmt: skip


@pytest.mark.slow
def test_targets_on_the_demo_model() -> None:
    """And each part of the codec lowers the divergence at 4 and 3 bits."""
    settings = Settings(kv=("k8v8", "k4v4"), tasks=(), chunks=4, ablate=True)
    found = Lab(None, settings).run()
    _, k8v8, k4v4 = (arm.fidelity.kld["mean"] for arm in found.arms)
    assert k8v8 < 0.001 and k4v4 <= 0.01
    for i in range(0, len(found.ablation), 4):
        whole, *without = (arm.fidelity.kld["mean"] for arm in found.ablation[i : i + 4])
        assert all(whole < kld for kld in without)
