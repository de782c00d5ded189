"""Settings that somebody gives do something, or are refused in a line that says the way out.

The kind of fault: a setting that does nothing beside the others, or is understood in one place and
not in another.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.config import CompressionConfig, kv_text, parse_kv
from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.sizes import parse_bytes

SIZES = {
    "64MB": 64 * 10**6, "64mb": 64 * 10**6, "64MiB": 64 * 2**20, "64M": 64 * 2**20,
    "64 m": 64 * 2**20, "512K": 512 * 2**10, "512KB": 512_000, "1.5GiB": 3 * 2**29,
    "2G": 2 * 2**30, "2.5GB": 2_500_000_000, "1T": 2**40, "700000": 700_000, "700000B": 700_000,
    "0": 0, "0.1": 1,
}  # fmt: skip
NO_SIZES = ("", "MB", "64Q", "64MBB", "-64MB", "6e4", "1.MB", "nan", "9" * 30, "10000000T", "1,5GB")


@pytest.mark.parametrize("text", SIZES)
def test_every_place_reads_sizes_alike(text: str) -> None:
    assert parse_bytes(text) == SIZES[text]
    parsed = CompressionConfig.parse(f"leankv:policy=budget,budget={text}")
    assert parsed.budget == SIZES[text]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; use"):
        parse_bytes(text)
    if "," not in text:
        with pytest.raises(ConfigError, match=r"budget=.*is not a size; use"):
            CompressionConfig.parse(f"leankv:policy=budget,budget={text}")


IDLE = {
    "k4v4,ratio=12": "ratio=12 does nothing with policy=keep_all; use policy=budget, or drop it",
    "budget=64MB": "budget=64MB does nothing with policy=keep_all",
    "policy=threshold,ratio=12": "use policy=budget",
    "policy=budget,alpha_high=2": "alpha_high=2 does nothing with policy=budget",
    "policy=streaming,alpha_low=0.1": "use policy=threshold",
    "policy=budget,high=0.3": "high=0.3 does nothing without a low tier; add low=k3v2",
    "policy=threshold,high=0.3": "use policy=budget",
    "scope=model": "use policy=budget",
    "low=k3v2": "use policy=budget or policy=threshold",
    "policy=streaming,low=k3v2": "use policy=budget or policy=threshold",
    "at=chunk": "use policy=budget or policy=threshold or policy=streaming",
    "scores=repeat": "does nothing with policy=keep_all",
    "policy=streaming,pooling=7": "pooling=7 does nothing",
    "lean,policy=keep_all,ratio=3": "ratio=3 does nothing",
    "paper,ratio=3": "ratio=3 does nothing with policy=threshold",
}


@pytest.mark.parametrize("settings", IDLE)
def test_a_setting_that_does_nothing_is_refused(settings: str) -> None:
    with pytest.raises(ConfigError) as refused:
        CompressionConfig.parse(f"leankv:{settings}")
    assert IDLE[settings] in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", IDLE)
def test_what_was_stored_goes_on_loading(settings: str, tmp_path: Path) -> None:
    config = CompressionConfig.parse(f"leankv:{settings}", stored=True)
    assert CompressionConfig.parse(config.spec(), stored=True) == config
    cache = CompressedKVCache(config)
    rows = mx.random.normal((1, 2, 150, 64))
    cache.update_and_fetch(rows, rows)
    save(tmp_path / "cache", [cache])
    (again,) = load(tmp_path / "cache").caches
    assert again.config == config and again.offset == 150
    assert CompressedKVCache.from_state(cache.state).config == config


@pytest.mark.parametrize(
    "settings",
    ["lean", "document", "paper", "lean,policy=streaming", "lean,policy=keep_all",
     "policy=budget,budget=64MB,ratio=2", "policy=budget,low=k3v2,high=0.3,at=chunk,pooling=7",
     "policy=threshold,low=none,alpha_high=2,alpha_low=1", "policy=streaming,at=chunk",
     "scope=model,policy=budget"],
)  # fmt: skip
def test_settings_that_do_something_are_taken(settings: str) -> None:
    config = CompressionConfig.parse(f"leankv:{settings}")
    assert CompressionConfig.parse(config.spec(), stored=True) == config


def test_every_value_of_kv_is_read_by_one_function() -> None:
    for text in ("none", " none ", "leankv", "k4v3", "leankv:k4v3,window=128"):
        config = parse_kv(text)
        assert (config is None) == (text.strip() == "none")
        assert parse_kv(kv_text(config)) == config
    with pytest.raises(ConfigError, match="does nothing"):
        parse_kv("k4v4,ratio=12")
    assert parse_kv("k4v4,ratio=12", stored=True) is not None


def test_the_chat_tells_somebody_who_types_it_and_takes_what_it_kept() -> None:
    from leankv_app.factory import full_kv

    with pytest.raises(ConfigError, match="ratio=12 does nothing"):
        full_kv("k4v4,ratio=12")
    assert full_kv("k4v4,ratio=12", stored=True) == "leankv:k4v4,ratio=12"
