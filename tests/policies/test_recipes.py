"""A policy and a scorer by the recipes of CONTRIBUTING.md: one file, one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import CompressedKVCache, owner_of
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError
from leankv_mlx.policies import DROP, POLICIES, Dropping, LayerSlots
from leankv_mlx.scorers import SCORERS, Scorer

HEADS, TOKENS, DIM, SINKS, WINDOW = 2, 300, 64, 4, 32


@dataclass(frozen=True)
class Every(Dropping):
    """Every so many-th stored token stays."""

    name: ClassVar[str] = "every"
    scored: ClassVar[bool] = False

    stride: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ConfigError(f"stride={self.stride} is out of range; use 1 or more.")

    def plan(self, layers: Sequence[LayerSlots]) -> list[Any]:
        plans = [layer.tiers.copy() for layer in layers]
        for plan in plans:
            plan[:, np.arange(plan.shape[1]) % self.stride != 0] = DROP
        return plans


@dataclass(frozen=True)
class Best(Dropping):
    """A number of tokens with the best scores stays."""

    name: ClassVar[str] = "best"

    count: int = 32

    def plan(self, layers: Sequence[LayerSlots]) -> list[Any]:
        plans = [np.full_like(layer.tiers, DROP) for layer in layers]
        for plan, layer in zip(plans, layers, strict=True):
            best = np.argsort(-layer.scores, axis=1, kind="stable")[:, : self.count]
            np.put_along_axis(plan, best, np.take_along_axis(layer.tiers, best, 1), 1)
        return plans


@dataclass(frozen=True)
class Oldest(Scorer):
    """The older a token, the higher its score, whatever looks at it."""

    name: ClassVar[str] = "oldest"

    halved_after: float = 64.0

    def judge(self, received: Any, positions: Any) -> Any:
        return np.where(positions < 0, 0, np.exp2(-positions / self.halved_after)).astype("float32")


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for policy in (Every, Best):
        monkeypatch.setitem(POLICIES, policy.name, policy)
    monkeypatch.setitem(SCORERS, Oldest.name, Oldest)


def after_a_prompt(kv: str) -> CompressedKVCache:
    cache, rng = CompressedKVCache(kv), np.random.default_rng(0)
    q, k, v = (
        mx.array(rng.standard_normal((1, heads, TOKENS, DIM)).astype(np.float32))
        for heads in (2 * HEADS, HEADS, HEADS)
    )
    fetched = owner_of(*cache.update_and_fetch(k, v))
    assert fetched is not None
    mx.eval(fetched.attend(q, scale=DIM**-0.5, mask="causal"))
    cache.sequence.end_prompt()
    return cache


def kept(cache: CompressedKVCache) -> list[list[int]]:
    """Positions of the stored tokens of each head."""
    assert cache.layer is not None and cache.layer.body is not None
    return [sorted(head[head >= 0].tolist()) for head in cache.layer.body.describe().positions]


def test_a_policy_is_a_file_and_a_row(tmp_path: Path) -> None:
    cache = after_a_prompt("leankv:policy=every,stride=3,window=32")
    assert cache.config.policy == Every(stride=3)
    assert cache.config.spec() == "leankv:k4v4,window=32,policy=every,stride=3"
    chunks = CompressionConfig.parse("leankv:policy=every,at=chunk,stride=3")
    assert chunks.policy == Every(stride=3, at="chunk") and chunks.policy.by_chunk
    assert chunks.spec() == "leankv:k4v4,policy=every,stride=3,at=chunk"
    assert kept(cache) == HEADS * [list(range(SINKS, SINKS + 256, 3))]
    save(tmp_path / "cache", [cache])
    (again,) = load(tmp_path / "cache").caches
    assert again.config == cache.config and kept(again) == kept(cache)
    with pytest.raises(ConfigError, match="stride=0 is out of range"):
        CompressionConfig.parse("leankv:policy=every,stride=0")
    with pytest.raises(ConfigError, match="stride=many is not a whole number"):
        CompressionConfig.parse("leankv:policy=every,stride=many")
    with pytest.raises(ConfigError, match="with policy=budget; use policy=every, or drop it"):
        CompressionConfig.parse("leankv:policy=budget,stride=3")
    with pytest.raises(ConfigError, match="pooling=7 does nothing with policy=every"):
        CompressionConfig.parse("leankv:policy=every,pooling=7")
    with pytest.raises(ConfigError, match="streaming, every, best"):
        CompressionConfig.parse("leankv:policy=other")


def test_a_scorer_is_a_file_and_a_row() -> None:
    cache = after_a_prompt("leankv:policy=best,count=40,scores=oldest,halved_after=32,window=32")
    assert cache.config.scorer == Oldest(halved_after=32)
    assert cache.config.spec() == (
        "leankv:k4v4,window=32,policy=best,count=40,scores=oldest,halved_after=32"
    )
    assert kept(cache) == HEADS * [list(range(SINKS, SINKS + 40))]
    assert kept(after_a_prompt("leankv:policy=best,count=40,window=32")) != kept(cache)
    with pytest.raises(ConfigError, match="with scores=oldest; use scores=queries or"):
        CompressionConfig.parse("leankv:policy=best,scores=oldest,pooling=7")
    with pytest.raises(ConfigError, match="with scores=queries; use scores=oldest, or drop it"):
        CompressionConfig.parse("leankv:policy=best,halved_after=32")


def test_without_its_row_a_policy_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(POLICIES, Every.name)
    with pytest.raises(ConfigError, match="is no policy; use KeepAll, Threshold, Budget"):
        CompressionConfig(policy=Every())
