"""Masks that nothing was learned for, to compare with."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache.masks import load
from leankv_mlx.evaluation.lab import SILENT
from leankv_mlx.learning import course as courses
from leankv_mlx.learning import sizes
from leankv_mlx.learning.checkpoint import Checkpoint
from leankv_mlx.learning.course import taught
from leankv_mlx.learning.lessons import Material
from leankv_mlx.learning.masks import Course
from leankv_mlx.learning.sizes import worth_by
from leankv_mlx.mlx_lm.attachment import own_caches
from tests.learning import tiny
from tests.models import TINY

SHAPES = [(2, 64)] * 3


def test_channels_are_worth_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = TINY["llama"](64), tiny.drawn(600)
    monkeypatch.setattr(sizes, "text_of", lambda *_: tokens)
    caches = own_caches(model)
    model(mx.array([tokens]), cache=caches)
    keys = np.stack([np.sqrt(np.square(np.array(c.state[0][0])).mean(axis=1)) for c in caches])
    found = worth_by("keys", tiny.loaded(model), SHAPES, Material(1, 600, 0))
    np.testing.assert_allclose(found, keys / keys.max(), rtol=1e-3)
    model.model.layers[1].self_attn.q_proj.weight *= 4  # the queries of one layer, but for RoPE
    both = worth_by("queries-keys", tiny.loaded(model), SHAPES, Material(1, 600, 0))
    assert both.dtype == np.float32 and both.max() == 1 and both.argmax() // 128 == 1
    assert both[1].mean() > 3 * both[[0, 2]].mean()


def test_a_seed_gives_the_same_chances() -> None:
    found = [worth_by("random", None, SHAPES, Material(1, 600, s)) for s in (3, 3, 4)]  # type: ignore[arg-type]
    assert found[0].shape == (3, 2, 64) and (found[0] == found[1]).all()
    assert np.abs(found[0] - found[2]).max() > 0.5 and abs(found[0].mean() - 0.5) < 0.1


@pytest.mark.parametrize("by", ["keys", "queries-keys", "random"])
def test_such_a_mask_leaves_a_course_alone_that_was_begun(
    by: sizes.By, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    begun = Checkpoint("mine", {})
    begun.save(7, {"x": mx.zeros(3)})
    found, _ = taught(None, "mine", Course(0.7), Material(1, 512, 0), SILENT, by)
    assert found.notes["by"] == by and found.groups.sum() == 6
    assert load("mine").digest == found.digest and begun.load() is not None


def test_the_bundled_model_computes_in_float32_and_keeps_its_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is several times faster."""
    if mx.default_device() == mx.gpu:
        pytest.skip("a GPU computes in 16 bits")
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    seen: list[mx.Dtype] = []

    def learned(loaded: tiny.LoadedModel, *_: object) -> None:
        seen.append(loaded.model.model.norm.weight.dtype)
        seen.extend(x.dtype for x in tiny.lessons(loaded.model).texts[0].beginning.rows[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(courses, "_learned", learned)
    with pytest.raises(KeyboardInterrupt):
        taught(None, "mine", Course(0.7), Material(1, 512, 0), SILENT)
    assert seen == [mx.float32, mx.bfloat16, mx.bfloat16]
