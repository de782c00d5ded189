"""The look at a mask: what is kept by frequency, how large queries and keys are, which head
retrieves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import fromstring

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache.masks import Masks
from leankv_mlx.errors import UnsupportedError
from leankv_mlx.evaluation import masks as looks
from leankv_mlx.evaluation.masks import Look, look, measured, tables, work
from leankv_mlx.mlx_lm import LoadedModel, attach, load
from leankv_mlx.mlx_lm.reading import prefill
from tests.models import TINY

RETRIEVES = 4, 1
"""Layer and KV head of the bundled model."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


def mask(shape: tuple[int, int, int] = (5, 2, 64), ratio: float = 0.5) -> Masks:
    alphas = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    return Masks.of(alphas, ratio, "model", "small", {"seed": "0"})


@pytest.fixture(scope="module")
def seen(loaded: LoadedModel) -> Look:
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looks, "_TOKENS", 300)
        patch.setattr(looks, "_QUESTIONS", 2)
        patch.setattr(looks, "prefill", partial(prefill, chunk=128))
        found = measured(loaded, "mine", mask(), told.append)
    assert len(told) == work(mask()) and told[0] == "reading"
    return found


def test_kept_by_frequency_is_in_the_models_order_of_channels() -> None:
    alphas = np.zeros((1, 2, 64), np.float32)
    alphas[0, :, 16:32] = alphas[0, :, 48:] = 1  # both channels of the slower half of the pairs
    found = look("mine", Masks.of(alphas, 0.5))
    assert found.masks.channels.tolist() == [[32, 32]]
    assert found.masks.kept[0, 0].tolist() == [i % 32 >= 16 for i in range(64)]
    assert found.by_pair().tolist() == [0] * 16 + [1] * 16
    assert found.bands() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("dim", [48, 80])
def test_a_head_keeps_no_more_channels_than_it_has(dim: int) -> None:
    found = look("mine", mask((2, 2, dim), 0))
    assert found.masks.channels.tolist() == [[dim] * 2] * 2
    assert found.masks.kept.all() and set(found.bands()) == {1.0}


def test_without_the_model_there_is_what_the_file_tells() -> None:
    found = look("mine", mask(ratio=0.7))
    grids = tables(found)
    about = dict(grids[0].rows)  # type: ignore[arg-type]
    assert about["model"] == "small" and about["digest"] == found.masks.digest
    assert about["key channels kept"] == "30.0%" and about["seed"] == "0"
    assert about["heads without middle tokens"] == "4 of 10"
    assert [grid.title for grid in grids][-1] == "Share of the channels kept, by frequency"
    document = json.loads(json.dumps(found.as_dict()))
    assert document["groups"] == found.masks.groups.tolist() and "heads" not in document


def test_the_head_that_retrieves_is_found(seen: Look) -> None:
    assert seen.heads is not None
    assert seen.heads.ranked()[0] == RETRIEVES
    losses = np.sort(seen.heads.loss.ravel())
    assert losses[-1] > 0.3 and losses[-2] < 0.1 * losses[-1]
    assert seen.heads.base < 0.1 and 250 < seen.heads.tokens <= 300
    row = tables(seen)[-1].rows[0]
    assert row[:2] == ["layer 4 head 1", str(seen.masks.channels[RETRIEVES])]
    document = seen.as_dict()["heads"]
    assert [(document[0]["layer"], document[0]["head"]), len(document)] == [RETRIEVES, 10]


def test_sizes_are_those_of_queries_and_keys(
    seen: Look, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same document, as the first layer makes them."""
    assert seen.sizes is not None
    monkeypatch.setattr(looks, "_TOKENS", 300)
    monkeypatch.setattr(looks, "_QUESTIONS", 2)
    document, asked = looks._questions(loaded)
    assert len(asked) == 2 and all(question and reply for question, reply in asked)
    layer = loaded.model.model.layers[0]
    x = layer.input_layernorm(loaded.model.model.embed_tokens(mx.array([document])))
    for side, heads in (("q", 4), ("k", 2)):
        made = layer.self_attn[f"{side}_proj"](x).astype(mx.float32)
        made = made.reshape(1, len(document), heads, 64).swapaxes(1, 2)
        rows = np.array(layer.self_attn.rope(made))[0].reshape(2, -1, len(document), 64)
        expected = np.sqrt(np.square(rows).mean(axis=(1, 2)))
        found = (seen.sizes.queries if side == "q" else seen.sizes.keys)[0]
        assert np.allclose(found, expected, rtol=0.02)
    assert seen.sizes.queries.shape == seen.sizes.keys.shape == (5, 2, 64)


def test_ranks_tell_what_grows_with_what(seen: Look) -> None:
    assert seen.sizes is not None
    sizes = seen.sizes.keys
    like = replace(seen, masks=replace(seen.masks, alphas=(sizes / sizes.max()) ** 3))
    assert like.correlations()["keys"] == pytest.approx(1)
    against = replace(seen, masks=replace(seen.masks, alphas=1 - sizes / sizes.max()))
    assert against.correlations()["keys"] == pytest.approx(-1, abs=1e-3)
    equal = replace(seen, masks=replace(seen.masks, alphas=np.zeros_like(sizes)))
    assert equal.correlations()["keys"] == 0


def test_a_model_whose_attention_does_not_ask_the_cache(loaded: LoadedModel) -> None:
    with pytest.raises(UnsupportedError, match="does not ask the cache"):
        measured(replace(loaded, model=TINY["gemma2"]()), "mine", mask(), lambda what: None)


def test_looking_leaves_the_model_as_it_was(seen: Look, loaded: LoadedModel) -> None:
    assert "make_cache" not in vars(loaded.model)
    assert attach(loaded.model).config.spec() == "leankv:k4v4"


def test_the_same_look_is_the_same_picture(seen: Look, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from leankv_mlx.evaluation.mask_plot import plot_look

    named = replace(seen, masks=replace(seen.masks, name="a $ \x1b[31m $ model"))
    one, two, small = (tmp_path / name for name in ("one.svg", "two.svg", "small.svg"))
    for file, shown in ((one, named), (two, named), (small, look("mine", mask()))):
        plot_look(shown, file)
        fromstring(file.read_text(encoding="utf-8"))
    assert one.read_bytes() == two.read_bytes()
    assert len(small.read_bytes()) < len(one.read_bytes())
