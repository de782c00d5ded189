"""Settings that somebody gives do something, or are refused in a line that says the way out.

The kind of fault: a setting that does nothing beside the others, or is understood in one place and
not in another.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.config import CompressionConfig, kv_text, parse_kv
from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.policies import POLICIES, Budget, KeepAll, Policy, Streaming, Threshold
from leankv_mlx.scorers import SCORERS, Queries, Repeat
from leankv_mlx.settings import MOST_SPARSE, Named, Sparse, settings_of
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
    assert parsed.policy == Budget(budget=SIZES[text])


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
    "low=k3v2": "use policy=threshold or policy=budget, or drop it",
    "policy=streaming,low=k3v2": "use policy=threshold or policy=budget, or drop it",
    "at=chunk": "use policy=threshold or policy=budget or policy=streaming",
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


def test_what_is_stored_does_not_say_who_computes() -> None:
    config = CompressionConfig.parse("k4v3,backend=reference,projections=mlx,window=128")
    assert config.portable.spec() == "leankv:k4v3,window=128"


def rows() -> Iterator[tuple[bool, str, str]]:
    """Of specs.txt: whether somebody may give these settings, the settings, their text form."""
    for line in Path(__file__).with_name("specs.txt").read_text().splitlines():
        allowed, text, spec = line.split("\t")
        yield allowed == "taken", text, spec


def test_text_forms_are_those_of_files_and_document_keys_of_before() -> None:
    """The kind of fault: a text form changes, and what was stored under the old one is lost.

    The rows were written by the first implementation, whose 22 settings were fields of one class.
    """
    count = 0
    for allowed, text, spec in rows():
        config = CompressionConfig.parse(text, stored=True)
        assert config.spec() == spec
        again = CompressionConfig.parse(spec, stored=True)
        assert again == config and hash(again) == hash(config) and again.spec() == spec
        if allowed:
            assert CompressionConfig.parse(text) == config
        else:
            with pytest.raises(ConfigError, match="does nothing"):
                CompressionConfig.parse(text)
        count += 1
    assert count > 200


AT = st.sampled_from(["prompt", "chunk"])
OF_POLICIES: list[st.SearchStrategy[Policy]] = [
    st.builds(KeepAll), st.builds(Streaming, at=AT),
    st.builds(
        Threshold, st.sampled_from(["auto", "none", (3, 2), (8, 2)]), st.floats(1, 1e6),
        st.floats(0, 1), at=AT,
    ),
    st.builds(
        Budget, st.sampled_from(["auto", "none", (3, 2), (2, 2)]), st.floats(1.001, 1e9),
        st.integers(0, 2**63 - 1), st.floats(0, 1), st.sampled_from(["layer", "model"]), at=AT,
    ),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(OF_POLICIES), st.sampled_from([Queries, Repeat]), st.integers(0, 127),
    st.floats(0, 0.999),
    st.builds(Sparse, st.floats(0, MOST_SPARSE), st.sampled_from(["", "mine", "a-b_3"])),
)  # fmt: skip
def test_every_configuration_survives_its_text(
    policy: Policy, scorer: Any, half: int, skip: float, sparse: Sparse
) -> None:
    config = CompressionConfig(policy=policy, scorer=scorer(2 * half + 1), skip=skip, sparse=sparse)
    again = CompressionConfig.parse(config.spec(), stored=True)
    assert again == config and again.spec() == config.spec()


def test_shares_are_read_as_numbers_or_percent_and_with_a_name() -> None:
    for text, sparse in {
        "0.25": Sparse(0.25), "25%": Sparse(0.25), "0": Sparse(), ".9": Sparse(0.9),
        "40 % @ mine": Sparse(0.4, "mine"), "0.25@a-b": Sparse(0.25, "a-b"),
    }.items():  # fmt: skip
        assert CompressionConfig.parse(f"leankv:sparse={text}").sparse == sparse
    for text in ("0.95", "25", "-0.1", "nan", "x", "", "0.25@../x", "0.25@k v", "101%"):
        with pytest.raises(ConfigError, match="sparse=") as refused:
            CompressionConfig.parse(f"leankv:sparse={text}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("setting", ["mask", "basis"])
def test_what_was_learned_is_named_with_or_without_its_digest(setting: str) -> None:
    for text, named in {
        "mine": Named("mine"), "a-b_3@0123abcd": Named("a-b_3", "0123abcd"),
        " mine @ 01234567": Named("mine", "01234567"),
    }.items():  # fmt: skip
        config = CompressionConfig.parse(f"leankv:k3v3,{setting}={text}")
        assert getattr(config, setting) == named
        assert config.spec() == f"leankv:k3v3,{setting}={named}"
        assert CompressionConfig.parse(config.spec()) == config and config.portable == config
    for text in ("", "@01234567", "mine@", "mine@0123", "mine@0123ABCD", "../mine", "3x", "a b"):
        with pytest.raises(ConfigError, match=f"{setting}=.* names no {setting}") as refused:
            CompressionConfig.parse(f"leankv:{setting}={text}")
        assert "\n" not in str(refused.value)


def test_a_basis_takes_the_place_of_a_mask_and_of_scales() -> None:
    with pytest.raises(ConfigError, match="mask=a and basis=b do not go together; drop one"):
        CompressionConfig.parse("leankv:mask=a,basis=b")
    for equalize in ("on", "off"):
        with pytest.raises(ConfigError, match=f"equalize={equalize} does nothing with basis=b"):
            CompressionConfig.parse(f"leankv:basis=b,equalize={equalize}")
    config = CompressionConfig.parse("leankv:basis=b")
    assert not config.equalizes and not config.settles
    assert CompressionConfig().equalizes and not CompressionConfig(equalize=False).equalizes


def test_what_decode_steps_leave_out_is_no_part_of_what_is_stored(tmp_path: Path) -> None:
    config = CompressionConfig.parse("leankv:k3v3,sparse=0.25@mine")
    cache = CompressedKVCache(config)
    rows = mx.random.normal((1, 2, 150, 64))
    cache.update_and_fetch(rows, rows)
    save(tmp_path / "cache", [cache])
    assert load(tmp_path / "cache").configs == [CompressionConfig(k_bits=3, v_bits=3)]


def test_what_another_policy_would_read_keeps_its_text_and_changes_nothing_else() -> None:
    config = CompressionConfig.parse("leankv:lean,policy=keep_all")
    assert config == CompressionConfig(window=32) and hash(config) == hash(replace(config, idle=()))
    assert config.spec() == "leankv:k4v4,window=32,ratio=14,scope=model"
    with pytest.raises(ConfigError, match=r"ratio=0\.5 is out of range"):
        CompressionConfig.parse("leankv:k4v4,ratio=0.5", stored=True)


def test_a_name_means_one_thing() -> None:
    own = set(settings_of(CompressionConfig)) | {"scores"}
    for table in (POLICIES, SCORERS):
        known: dict[str, Any] = {}
        for name, part in table.items():
            assert part.name == name
            for setting in settings_of(part).values():
                assert known.setdefault(setting.name, setting) == setting
        assert not own & set(known)
        own |= set(known)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CompressionConfig(policy="budget"),  # type: ignore[arg-type]
        lambda: CompressionConfig(scorer=KeepAll()),  # type: ignore[arg-type]
        lambda: Budget(scope="head"),  # type: ignore[arg-type]
        lambda: Budget(ratio=1), lambda: Budget(high=2), lambda: Budget(budget=-1),
        lambda: Budget(low=(5, 5)), lambda: Threshold(low="small"),  # type: ignore[arg-type]
        lambda: Threshold(alpha_low=2), lambda: Queries(pooling=4), lambda: Repeat(pooling=257),
    ],
)  # fmt: skip
def test_objects_with_wrong_values_are_not_made(make: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert "; use " in str(refused.value) and "\n" not in str(refused.value)


def test_settings_are_read_without_numpy() -> None:
    """The chat reads them before its first screen."""
    code = (
        "import sys; from leankv_mlx.config import CompressionConfig as C; "
        "C.parse('leankv:paper').spec(); print(sorted({'numpy', 'mlx.core'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
