"""Attaching with a basis of keys: whose it is, what it fits, and what is named by it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from leankv_mlx.cache.bases import FILES, Bases
from leankv_mlx.codec.basis import Basis
from leankv_mlx.codec.channels import Channels
from leankv_mlx.config import CompressionConfig
from leankv_mlx.engine.catalogue import find
from leankv_mlx.engine.plan import plan
from leankv_mlx.engine.recoding import can_become, recoded
from leankv_mlx.engine.session import Session
from leankv_mlx.errors import CalibrationError, ConfigError, LeanKVError, UnsupportedError
from leankv_mlx.folders import folder
from leankv_mlx.mlx_lm import LoadedModel, attach, attachment, load
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.commands.session import Session as Command
from leankv_mlx.mlx_lm.footprint import Footprint
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.mlx_lm.usage import measure
from leankv_mlx.profiles import save_profile, user_profiles
from leankv_mlx.serving.keys import kv_name
from leankv_mlx.settings import Named
from tests.bases import basis
from tests.documents.shelf import TOKENS, Shelf
from tests.mlx_lm.commands import LONG, MODEL, Here
from tests.models import TINY

LAYERS, HEADS, DIM = 5, 2, 64  # of the bundled model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))


def layers(count: int = LAYERS, heads: int = HEADS, dim: int = DIM, seed: int = 0) -> list[Basis]:
    return [basis(heads, dim, 10, 10 * seed + i) for i in range(count)]


def learned(loaded: LoadedModel, seed: int = 0, name: str = "mine", **changes: Any) -> Bases:
    """A basis of the bundled model, in its file."""
    found = Bases(tuple(layers(seed=seed)), fingerprint(loaded.path), loaded.path.name)
    FILES.save(replace(found, **changes), name)
    return found


def test_a_name_finds_the_basis_of_the_model(loaded: LoadedModel) -> None:
    found = learned(loaded)
    attached = attach(loaded.model, "k4v4,basis=mine")
    assert attached.config.basis == Named("mine", found.digest)
    assert attached.config.spec() == f"leankv:k4v4,basis=mine@{found.digest}"
    assert attached.learned == list(found.layers)
    assert {row.reason for row in attached.report} == {attached.config.spec()}
    with attached:
        caches = make_prompt_cache(loaded.model)
        loaded.model(mx.array([TOKENS]), cache=caches)
        again = make_prompt_cache(loaded.model)
    for cache, other, wanted in zip(caches, again, found.layers, strict=True):
        assert cache.learned is other.learned == wanted  # the arrays are there once
        assert cache.layer.space.basis is cache.learned and cache.layer.space.equalizer is None


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("gemma2", "deepseek_v3")])
def test_every_kind_of_model_says_what_it_says_without(name: str) -> None:
    model, places = TINY[name](), TINY[name].compressed
    of = layers(len(places), 4 if name == "deepseek_v2" else 2)
    said = []
    for kv, given in (("k8v8,window=32", None), ("k8v8,window=32,basis=mine", of)):
        with attach(model, kv, learned=given) as attached:
            caches, out = make_prompt_cache(model), []
            for tokens in (150, 20, 1, 1, 40, 1):
                out.append(model(mx.arange(tokens)[None] % 100, cache=caches)[0])
            said.append(np.concatenate([np.array(x) for x in out]))
            paths = [row.attention for row in attached.report if row.compressed]
            assert paths == ["fused"] * len(places)
    assert np.linalg.norm(said[1] - said[0]) < 0.1 * np.linalg.norm(said[0])


def told(model: nn.Module, kv: str, error: type[LeanKVError], **options: Any) -> str:
    with pytest.raises(error) as raised:
        attach(model, kv, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bases_that_are_not_of_the_model(loaded: LoadedModel) -> None:
    missing = told(loaded.model, "basis=mine", CalibrationError)
    assert missing == "there is no basis 'mine'; run leankv learn rotations MODEL -o mine."
    learned(loaded, model="another", name="other")
    assert "is for demo_model, not for" in told(loaded.model, "basis=other", CalibrationError)
    learned(loaded, layers=tuple(layers(2)), name="short")
    short = told(loaded.model, "basis=short", CalibrationError)
    assert "does not fit the layers of this model; run leankv learn rotations MODEL -o" in short
    for wrong in (layers(2), layers(heads=4), layers(dim=32), []):
        text = told(loaded.model, "basis=mine", CalibrationError, learned=wrong)
        assert "does not fit" in text
    other = told(loaded.model, "basis=mine@01234567", ConfigError, learned=layers())
    assert "not of basis=mine@01234567" in other
    assert "name it" in told(loaded.model, "k4v4", ConfigError, learned=layers())
    assert "load it with" in told(TINY["llama"](), "basis=mine", CalibrationError)
    masks = [Channels((tuple(range(DIM)),) * HEADS, (1, 1))] * LAYERS
    assert "is no basis" in told(loaded.model, "basis=mine", ConfigError, learned=masks)
    assert "is no mask" in told(loaded.model, "mask=mine", ConfigError, learned=layers())
    assert "do not go together" in told(loaded.model, "basis=mine,mask=mine", ConfigError)


def test_models_that_cannot_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    itself = told(TINY["gemma2"](), "basis=mine", UnsupportedError)
    assert itself.endswith("whose attention does not ask the cache; drop it.")
    assert "nothing is compressed" in told(TINY["deepseek_v3"](), "basis=mine", UnsupportedError)
    monkeypatch.setattr(attachment, "machines_of", lambda model: 2)
    split = told(TINY["llama"](), "basis=mine", UnsupportedError)
    assert split == "basis=mine works with a whole model; drop it, or use one machine."


def test_the_footprint_is_what_is_held() -> None:
    model = TINY["llama"](head_dim=DIM)
    with attach(model, "k3v3,basis=mine", learned=layers(3)) as attached:
        footprint = Footprint.of(model, attached)
        caches: Any = make_caches(model)
        for tokens in (20, 400):
            mx.eval(model(mx.ones((1, tokens), mx.int32), cache=caches))
        assert footprint.used(420) == measure(caches).used


# What is named by it.


def test_nothing_is_stored_by_a_name_alone() -> None:
    with pytest.raises(ConfigError, match="basis=mine names nothing that is stored"):
        kv_name(CompressionConfig.parse("basis=mine"))
    assert kv_name(CompressionConfig.parse("basis=mine@01234567")).endswith("basis=mine@01234567")


def as_numbers(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32))


def test_a_chat_changes_to_it_by_reading_anew(loaded: LoadedModel, tmp_path: Path) -> None:
    found, shelf = learned(loaded), Shelf(tmp_path / "documents")
    session = Session.begin("", loaded, CompressionConfig.parse("k4v4"), 10**9, shelf.cache)
    try:
        assert session.recode(CompressionConfig.parse("k4v4,basis=mine"))
        assert session.opener.config == CompressionConfig.parse(f"k4v4,basis=mine@{found.digest}")
    finally:
        session.close()
    with attach(loaded.model, "k8v8,basis=mine") as attached:
        caches = make_prompt_cache(loaded.model)
        loaded.model(mx.array([TOKENS]), cache=caches)
        assert not can_become(caches[0], CompressionConfig.parse("k4v4"))
        lower = replace(attached.config, k_bits=4, v_bits=4)
        assert can_become(caches[0], lower)
    with attach(loaded.model, lower):
        fresh = make_prompt_cache(loaded.model)
    again = recoded(caches[0], fresh[0])
    pairs = zip(again.keys_and_values(), caches[0].keys_and_values(), strict=True)
    for now, then in (map(as_numbers, pair) for pair in pairs):
        assert np.linalg.norm(now - then) < 0.2 * np.linalg.norm(then)


def test_a_plan_has_no_profile_whose_basis_may_be_of_another_model() -> None:
    save_profile(user_profiles(), "turned", "k3v3,basis=mine@01234567", "")
    assert "turned" not in [row.profile for row in plan(find("llama-3.1-8b"), 12 * 10**9).rows]


def test_a_draft_has_no_basis_of_another_model(loaded: LoadedModel) -> None:
    learned(loaded)
    command = Command("test")
    command.config = CompressionConfig.parse("k4v4,basis=mine")
    try:
        command._attach(loaded.model)
        command._attach(TINY["llama"](), draft=True)
        assert [bool(each.config.basis) for each in command.attachments] == [True, False]
    finally:
        command.close()


def test_mlx_lms_own_files_hold_the_matrices_too(loaded: LoadedModel, tmp_path: Path) -> None:
    found, file = learned(loaded), str(tmp_path / "cache.safetensors")
    with attach(loaded.model, "k3v3,window=32,basis=mine"):
        for tokens in (TOKENS, TOKENS[:9]):  # with a body, and without
            caches = make_prompt_cache(loaded.model)
            loaded.model(mx.array([tokens]), cache=caches)
            save_prompt_cache(file, caches)
            again = load_prompt_cache(file)
            assert [cache.learned for cache in again] == list(found.layers)
            twins = deepcopy(caches)
            logits = [loaded.model(mx.array([[7]]), cache=each) for each in (twins, again)]
            assert mx.array_equal(*logits)


def test_a_prompt_cache_file_has_its_basis_with_it(
    loaded: LoadedModel, here: Here, tmp_path: Path
) -> None:
    found, file = learned(loaded), str(tmp_path / "prompt")
    made = ["--model", MODEL, "--prompt-cache-file", file, "--prompt", LONG]
    assert here("cache_prompt", *made, "--kv", "leankv:k4v4,basis=mine")[0] == 0
    ask = ["--prompt", "what?", "--max-tokens", "8", "--verbose", "F"]
    flags = [*ask, "--prompt-cache-file", file, "--kv"]
    code, said, _ = here("generate", *flags, "leankv:k4v4,basis=mine")
    assert code == 0
    (folder("config") / "bases" / "mine.safetensors").unlink()
    for kv in ("leankv", "leankv:k4v4,basis=mine", f"leankv:k4v4,basis=mine@{found.digest}"):
        assert here("generate", *flags, kv)[:2] == (0, said)
    for kv in ("leankv:k4v4", "leankv:k4v4,basis=other", "leankv:k4v4,mask=mine"):
        code, out, err = here("generate", *flags, kv)
        assert (code, out) == (2, "") and f"holds leankv:k4v4,basis=mine@{found.digest}" in err
