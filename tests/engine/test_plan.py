"""Plans use the accounting of the cache: the numbers are those of real buffers."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.memory import planned
from leankv_mlx.cli import app
from leankv_mlx.config import CompressionConfig
from leankv_mlx.engine.catalogue import CatalogueEntry, catalogue, find
from leankv_mlx.engine.plan import kv_bytes, plan
from leankv_mlx.profiles import profiles


def filled(config: CompressionConfig, tokens: int, heads: int, k_dim: int, v_dim: int,
           chunk: int) -> CompressedKVCache:  # fmt: skip
    cache = CompressedKVCache(config)
    for start in range(0, tokens, chunk):
        n = min(chunk, tokens - start)
        keys = mx.random.normal((1, heads, n, k_dim)).astype(mx.float16)
        values = mx.random.normal((1, heads, n, v_dim)).astype(mx.float16)
        mx.eval(cache.update_and_fetch(keys, values))
    return cache


@pytest.mark.parametrize("spec", [*profiles().values(), "k2v8,window=128,sink_tokens=0,equalize=on",
                                  "rounding=rms"])  # fmt: skip
@pytest.mark.parametrize("tokens", [9, 100, 131, 1000, 1500])
def test_planned_bytes_are_those_of_real_buffers(spec: str, tokens: int) -> None:
    config = CompressionConfig.parse(f"leankv:{spec},backend=reference")
    for heads, k_dim, v_dim, chunk in ((2, 64, 64, 2048), (3, 96, 64, 512)):
        cache = filled(config, tokens, heads, k_dim, v_dim, chunk)
        assert cache.memory() == planned(config, tokens, heads, k_dim, v_dim, chunk=chunk)


def test_single_tokens_stay_within_a_block_of_the_plan() -> None:
    config = CompressionConfig()
    cache = filled(config, 300, 2, 64, 64, 2048)
    for n in range(301, 420):
        row = mx.random.normal((1, 2, 1, 64)).astype(mx.float16)
        mx.eval(cache.update_and_fetch(row, row))
        exact = cache.memory().exact - planned(config, n, 2, 64, 64).exact
        assert exact in (0, 32 * 2 * 128 * 2)


def test_the_plan_is_the_longest_context_that_fits() -> None:
    entry = find("llama-3.1-8b")
    found = plan(entry, 12 * 10**9)
    assert [row.profile for row in found.rows] == ["fp16", *profiles()]
    assert found.kv_budget == 12 * 10**9 - entry.weights - 2 * 10**9
    for row in found.rows:
        config = None if row.kv == "none" else CompressionConfig.parse(row.kv)
        assert row.kv_bytes == kv_bytes(entry, config, row.tokens) <= found.kv_budget
        if row.limited_by == "memory":
            assert kv_bytes(entry, config, row.tokens + 1) > found.kv_budget
        else:
            assert row.tokens == entry.context
    fp16, default = found.rows[:2]
    assert default.tokens > 2.9 * fp16.tokens


def test_sliding_layers_cost_their_window_only() -> None:
    entry = CatalogueEntry("x", "", 1, 3, 512, 2, 64, 10**6, 0, "default")
    row = 2 * 2 * 64 * 2
    assert kv_bytes(entry, None, 256) == 4 * 256 * row
    assert kv_bytes(entry, None, 10240) == (10240 + 3 * 512) * row


def test_the_list_of_models() -> None:
    entries = catalogue()
    assert len(entries) >= 13
    assert entries[0].name == "demo"
    known = profiles()
    for entry in entries:
        assert entry.kv in known
        assert entry.full_layers > 0
        assert bool(entry.sliding_layers) == bool(entry.window)
        assert entry.weights > 0
        assert entry.head_dim % 32 == 0
    families = ("llama", "qwen", "gemma", "mistral", "phi", "gpt-oss")
    assert all(any(entry.name.startswith(name) for entry in entries) for name in families)
    assert find("mlx-community/phi-4-4bit").name == "phi-4"


def test_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["models", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)) == len(catalogue())
    assert app.run(["models"]) == 0
    assert "gemma-3-12b" in capfd.readouterr().out
    assert app.run(["plan", "qwen3-8b", "--memory", "16GB", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["rows"][0]["profile"] == "fp16"
    assert app.run(["plan", "qwen3-8b"]) == 0
    assert "longest context" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "nosuch"], "no model 'nosuch' in the list; "),
        (["plan", "qwen3-4b"], "(is it qwen3-4b-2507?)"),
        (["plan", "qwen3-8b", "--memory", "much"], "'much' is not a size"),
        (["plan", "llama-3.3-70b", "--memory", "16GB"], "nothing of 16GB is left"),
    ],
)
def test_bad_input(arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 2
    assert text in capfd.readouterr().err
