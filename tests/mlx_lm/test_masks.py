"""Attaching with a mask of key channels: whose it is, what it fits, and what is named by it."""

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

from leankv_mlx.cache import Sequences, fetch
from leankv_mlx.cache.masks import Masks, save
from leankv_mlx.cache.masks import load as find_mask
from leankv_mlx.codec.channels import Channels
from leankv_mlx.config import CompressionConfig
from leankv_mlx.engine.catalogue import find
from leankv_mlx.engine.plan import plan
from leankv_mlx.engine.recoding import can_become
from leankv_mlx.engine.session import Session
from leankv_mlx.errors import CalibrationError, ConfigError, LeanKVError, UnsupportedError
from leankv_mlx.folders import folder
from leankv_mlx.mlx_lm import LoadedModel, attach, attachment, load
from leankv_mlx.mlx_lm.attachment import own_caches
from leankv_mlx.mlx_lm.commands.session import Session as Command
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.mlx_lm.watching import watched
from leankv_mlx.profiles import save_profile, user_profiles
from leankv_mlx.serving.keys import kv_name
from leankv_mlx.settings import Named
from tests.documents.shelf import TOKENS, Shelf
from tests.mlx_lm.commands import LONG, MODEL, ONE_ERROR, Here
from tests.models import TINY

LAYERS, HEADS, DIM = 5, 2, 64  # of the bundled model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))


def learned(loaded: LoadedModel, seed: int = 0, name: str = "mine", **changes: Any) -> Masks:
    """A mask of the bundled model, in its file."""
    alphas = np.random.default_rng(seed).uniform(0, 1, (LAYERS, HEADS, DIM)).astype(np.float32)
    found = Masks.of(alphas, 0.7, fingerprint(loaded.path), loaded.path.name)
    save(replace(found, **changes), name)
    return found


def simple(heads: int = 2, dim: int = 64, groups: tuple[int, ...] = (0, 1)) -> Channels:
    return Channels((tuple(range(dim))[::-1],) * heads, (groups * heads)[:heads])


# Whose it is.


def test_the_mask_that_ships_is_that_of_the_bundled_model(loaded: LoadedModel) -> None:
    found = find_mask("demo")
    groups = sum(sum(layer.groups) for layer in found.layers)
    assert (found.ratio, groups) == (0.7, 6)  # of 20
    assert found.model == fingerprint(loaded.path) and found.notes["by"] == "learned"
    with attach(loaded.model, "k4v4,mask=demo") as attached:
        assert attached.config.mask == Named("demo", found.digest)


def test_a_name_finds_the_mask_of_the_model(loaded: LoadedModel) -> None:
    mask = learned(loaded)
    attached = attach(loaded.model, "k4v4,mask=mine")
    assert attached.config.mask == Named("mine", mask.digest)
    assert attached.config.spec() == f"leankv:k4v4,mask=mine@{mask.digest}"
    assert attached.learned == list(mask.layers)
    with attached:
        caches = make_prompt_cache(loaded.model)
        loaded.model(mx.array([TOKENS]), cache=caches)
    assert [cache.learned for cache in caches] == list(mask.layers)
    assert {cache.config for cache in caches} == {attached.config}
    again = attach(loaded.model, attached.config.spec())
    assert (again.config, again.learned) == (attached.config, attached.learned)
    assert attach(loaded.model).learned == [None] * LAYERS


def test_the_report_says_what_a_layer_keeps(loaded: LoadedModel) -> None:
    groups = (2, 1), (0, 2), (1, 1), (0, 0), (2, 2)
    layers = [simple(groups=each) for each in groups]
    reasons = [r.reason for r in attach(loaded.model, "mask=mine", learned=layers).report]
    assert [reason.partition("; ")[2] for reason in reasons] == [
        "keeps 75% of its key channels",
        "keeps 50% of its key channels, 1 of 2 heads hold middle tokens",
        "keeps 50% of its key channels",
        "keeps 0% of its key channels, 0 of 2 heads hold middle tokens",
        "keeps 100% of its key channels",
    ]


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("gemma2", "deepseek_v3")])
def test_every_kind_of_model_whose_attention_asks_the_cache(name: str) -> None:
    model = TINY[name]()
    places = TINY[name].compressed
    layer = simple(heads=4 if name == "deepseek_v2" else 2)
    with attach(model, "k8v8,window=32,mask=mine", learned=[layer] * len(places)) as attached:
        caches = make_prompt_cache(model)
        for tokens in (150, 20, 1, 1, 40, 1):  # beyond the window, so codes are read
            logits = model(mx.ones((1, tokens), mx.int32), cache=caches)
        assert mx.isfinite(logits).all()
        assert [row.attention for row in attached.report if row.compressed] == ["fused"] * len(
            places
        )
    assert [i for i, channels in enumerate(attached.learned) if channels] == list(places)
    for place in places:
        held = caches[place].view().tiers
        lengths = sum(np.array(tier.lengths) for tier in held)
        assert list(lengths > 0) == [groups > 0 for groups in layer.groups]


def test_it_keeps_what_it_says(loaded: LoadedModel) -> None:
    """With all channels, in another order, a model says what it says without a mask, and so it does
    within its prompt; once that is in, with none something else."""

    def logits(kv: str, groups: int | None = None) -> list[mx.array]:
        layers = None if groups is None else [simple(groups=(groups,))] * LAYERS
        with attach(loaded.model, kv, learned=layers):
            caches = make_prompt_cache(loaded.model)
            loaded.model(mx.array([TOKENS]), cache=caches)
            twins = deepcopy(caches)
            Sequences.of(twins).end_prompt()
            last = mx.array([[7]])
            return [loaded.model(last, cache=each) for each in (caches, twins)]

    expected = logits("k8v8,window=32")[0]
    masked = [logits("k8v8,window=32,mask=mine", groups) for groups in (2, 0)]
    prompts, replies = zip(*masked, strict=True)
    differ = [mx.abs(each - expected).max().item() for each in (*prompts, *replies)]
    assert max(differ[:3]) < 0.3 and differ[3] > 1


def told(model: nn.Module, kv: str, error: type[LeanKVError], **options: Any) -> str:
    with pytest.raises(error) as raised:
        attach(model, kv, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_masks_that_are_not_of_the_model(loaded: LoadedModel) -> None:
    assert "no mask 'mine'; run leankv learn masks MODEL -o mine" in told(
        loaded.model, "mask=mine", CalibrationError
    )
    old = learned(loaded)
    learned(loaded, 1)
    assert f"mask=mine@{old.digest} was learned anew" in told(
        loaded.model, f"mask=mine@{old.digest}", CalibrationError
    )
    learned(loaded, model="another", name="other")
    assert "is for demo_model, not for demo_model" in told(
        loaded.model, "mask=other", CalibrationError
    )
    learned(loaded, layers=(simple(),), alphas=np.ones((1, 2, 64), np.float32), name="short")
    assert "does not fit the layers of this model; run leankv learn masks MODEL -o short" in told(
        loaded.model, "mask=short", CalibrationError
    )
    assert "load it with leankv_mlx.mlx_lm.load" in told(
        TINY["llama"](), "mask=mine", CalibrationError
    )


SHAPES: dict[str, list[Channels]] = {
    "too few layers": [simple()] * 2,
    "too many layers": [simple()] * 4,
    "other heads": [simple(heads=4)] * 3,
    "another head_dim": [simple(dim=128)] * 3,
    "one that differs": [simple(), simple(), simple(dim=32)],
    "no layers": [],
}


@pytest.mark.parametrize("what", SHAPES)
def test_channels_that_do_not_fit(what: str) -> None:
    text = told(TINY["llama"](), "mask=mine", CalibrationError, learned=SHAPES[what])
    assert "does not fit" in text


def test_channels_are_those_of_the_mask_that_is_named() -> None:
    model = TINY["llama"]()
    assert "name it" in told(model, "k4v4", ConfigError, learned=[simple()] * 3)
    assert "not of mask=mine@01234567" in told(
        model, "mask=mine@01234567", ConfigError, learned=[simple()] * 3
    )


def test_models_that_cannot_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    computes_itself = told(TINY["gemma2"](), "mask=mine", UnsupportedError)
    assert computes_itself.endswith("whose attention does not ask the cache; drop it.")
    assert "nothing is compressed" in told(TINY["deepseek_v3"](), "mask=mine", UnsupportedError)
    monkeypatch.setattr(attachment, "machines_of", lambda model: 2)
    split = told(TINY["llama"](), "mask=mine@01234567", UnsupportedError)
    assert split == "mask=mine@01234567 works with a whole model; drop it, or use one machine."


def test_looking_leaves_the_model_and_its_caches_as_they_were() -> None:
    model = TINY["gpt_oss"]()
    namespace = vars(__import__(type(model).__module__, fromlist=["x"]))
    before, tokens, living = dict(namespace), mx.arange(50)[None], len(fetch._FETCHES)
    expected = model(tokens, cache=own_caches(model))
    seen: list[tuple[int, tuple[int, ...], int]] = []
    caches = own_caches(model)
    with watched(model, caches, lambda i, x: seen.append((i, x.queries.shape, x.keys.shape[2]))):
        assert mx.allclose(model(tokens, cache=caches), expected, atol=1e-5)
    assert seen == [(i, (1, 4, 50, 64), 50) for i in range(4)]
    assert dict(namespace) == before
    assert len(fetch._FETCHES) == living  # nothing lives on
    assert not any("update_and_fetch" in vars(cache) for cache in caches)
    step = model(tokens[:, :1], cache=deepcopy(caches))
    assert mx.allclose(step, model(tokens[:, :1], cache=caches))


# What is named by it.


def test_nothing_is_stored_by_a_name_alone() -> None:
    with pytest.raises(ConfigError, match="mask=mine names nothing that is stored"):
        kv_name(CompressionConfig.parse("mask=mine"))
    assert kv_name(CompressionConfig.parse("mask=mine@01234567")).endswith(",mask=mine@01234567")


def test_a_chat_names_what_it_stores_by_its_mask(loaded: LoadedModel, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "documents")
    mask = learned(loaded)
    session = Session.begin("", loaded, CompressionConfig.parse("k4v4"), 10**9, shelf.cache)
    try:
        assert session.recode(CompressionConfig.parse("k4v4,mask=mine"))
        assert session.opener.config == CompressionConfig.parse(f"k4v4,mask=mine@{mask.digest}")
    finally:
        session.close()
    again = Session.begin("", loaded, CompressionConfig.parse("mask=mine"), 10**9, shelf.cache)
    again.close()
    assert again.opener.config is not None and again.opener.config.mask.digest == mask.digest


def test_what_a_mask_left_out_is_not_won_back_by_recoding(loaded: LoadedModel) -> None:
    layers = [simple(groups=(1, 1))] * LAYERS
    with attach(loaded.model, "k4v4,mask=mine", learned=layers) as attached:
        caches = make_prompt_cache(loaded.model)
        loaded.model(mx.array([TOKENS]), cache=caches)
    assert can_become(caches[0], attached.config)
    assert not can_become(caches[0], CompressionConfig.parse("k4v4"))
    assert not can_become(caches[0], replace(attached.config, mask=Named("mine", "01234567")))


def test_a_plan_has_no_profile_whose_mask_may_be_of_another_model() -> None:
    save_profile(user_profiles(), "masked", "k4v4,mask=mine@01234567", "")
    save_profile(user_profiles(), "other", "k4v4", "")
    profiles = [row.profile for row in plan(find("llama-3.1-8b"), 12 * 10**9).rows]
    assert "other" in profiles and "masked" not in profiles


def test_a_draft_has_no_mask_of_another_model(loaded: LoadedModel) -> None:
    learned(loaded)
    command = Command("test")
    command.config = CompressionConfig.parse("k4v4,mask=mine")
    try:
        command._attach(loaded.model)
        command._attach(TINY["llama"](), draft=True)
        assert [bool(each.config.mask) for each in command.attachments] == [True, False]
    finally:
        command.close()


def test_mlx_lms_own_files_hold_channels_too(loaded: LoadedModel, tmp_path: Path) -> None:
    mask, file = learned(loaded), str(tmp_path / "cache.safetensors")
    with attach(loaded.model, "k4v4,window=32,mask=mine"):
        caches = make_prompt_cache(loaded.model)
        loaded.model(mx.array([TOKENS]), cache=caches)
        for narrowed in (False, True):
            if narrowed:
                Sequences.of(caches).narrow()
            save_prompt_cache(file, caches)
            again = load_prompt_cache(file)
            assert [cache.layer.narrowed for cache in again] == [narrowed] * LAYERS
            twins = deepcopy(caches)
            logits = [loaded.model(mx.array([[7]]), cache=each) for each in (twins, again)]
            assert mx.array_equal(*logits)
    assert [cache.learned for cache in again] == list(mask.layers)


ASK = ["--prompt", "what?", "--max-tokens", "8", "--verbose", "F"]


def test_a_prompt_cache_file_has_its_mask_with_it(
    loaded: LoadedModel, here: Here, tmp_path: Path
) -> None:
    mask = learned(loaded)
    file = str(tmp_path / "prompt")
    made = ["--model", MODEL, "--prompt-cache-file", file, "--prompt", LONG]
    assert here("cache_prompt", *made, "--kv", "leankv:k4v4,mask=mine")[0] == 0
    flags = [*ASK, "--prompt-cache-file", file, "--kv"]
    code, said, _ = here("generate", *flags, "leankv:k4v4,mask=mine")
    assert code == 0
    (folder("config") / "masks" / "mine.safetensors").unlink()
    for kv in ("leankv", "leankv:k4v4,mask=mine", f"leankv:k4v4,mask=mine@{mask.digest}"):
        assert here("generate", *flags, kv)[:2] == (0, said)
    for kv in ("leankv:k4v4", "leankv:k4v4,mask=other", "leankv:k4v4,mask=mine@01234567"):
        code, out, err = here("generate", *flags, kv)
        assert (code, out) == (2, "") and f"holds leankv:k4v4,mask=mine@{mask.digest}" in err


def test_a_mask_that_is_missing_is_one_line(here: Here) -> None:
    code, out, err = here("generate", *ASK, "--model", MODEL, "--kv", "leankv:mask=mine")
    assert (code, out) == (1, "") and ONE_ERROR.fullmatch(err)
    assert "no mask 'mine'; run leankv learn masks MODEL -o mine" in err
