"""Documents that were stored with a mask of key channels, and with the next one of its name."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.masks import Masks, save
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.prefix import Opened, Opener
from leankv_mlx.documents.reader import Reader
from leankv_mlx.errors import ConfigError
from leankv_mlx.mlx_lm import LoadedModel, load
from leankv_mlx.mlx_lm.loading import fingerprint
from tests.documents.shelf import TOKENS, Shelf

CONFIG = CompressionConfig.parse("k4v4,window=32,mask=mine")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    return Shelf(tmp_path / "documents")


def learn(loaded: LoadedModel, seed: int) -> None:
    alphas = np.random.default_rng(seed).uniform(0, 1, (5, 2, 64)).astype(np.float32)
    save(Masks.of(alphas, 0.7, fingerprint(loaded.path), loaded.path.name), "mine")


def opened(loaded: LoadedModel, shelf: Shelf) -> tuple[Opened, mx.array]:
    """A document, and what the model says behind it."""
    with Reader(loaded, CONFIG, 10**9, shelf.cache) as reader:
        found = reader._opener.open(TOKENS, "report.txt", lambda done, total: None)
        return found, loaded.model(mx.array([[7]]), cache=found.caches)


def test_a_document_of_one_mask_is_not_opened_with_the_next(
    loaded: LoadedModel, shelf: Shelf
) -> None:
    learn(loaded, 0)
    (read, said), (again, same) = opened(loaded, shelf), opened(loaded, shelf)
    assert (read.cached, again.cached) == (False, True) and mx.array_equal(said, same)
    learn(loaded, 1)
    other, different = opened(loaded, shelf)
    assert not other.cached and not mx.array_equal(said, different)
    learn(loaded, 0)
    back, same = opened(loaded, shelf)
    assert back.cached and mx.array_equal(said, same)
    assert len(shelf.files) == 2 and not shelf.notes


@pytest.mark.parametrize("policy", ["", ",policy=budget,ratio=20,scores=repeat"])
def test_a_document_is_stored_without_what_its_mask_leaves_out(
    loaded: LoadedModel, shelf: Shelf, policy: str
) -> None:
    """And questions find it so, the first like the second, read or opened."""
    learn(loaded, 0)
    config, said = CompressionConfig.parse(f"{CONFIG.spec()}{policy}"), []
    document = TOKENS * 4
    for _ in "read", "opened":
        with Reader(loaded, config, 10**9, shelf.cache) as reader:
            found = reader._opener.open(document, "report.txt", lambda done, total: None).caches
            layers = [c.layer for c in found if isinstance(c, CompressedKVCache)]
            assert layers and all(layer.narrowed and layer.body for layer in layers)
            for question in ([7, 8, 9] * 20, [9, 8] * 20):
                caches = deepcopy(found)
                loaded.model(mx.array([question]), cache=caches)
                said.append(loaded.model(mx.array([[7]]), cache=caches))
    assert mx.array_equal(said[0], said[2]) and mx.array_equal(said[1], said[3])


def test_nothing_is_stored_by_the_name_of_a_mask_alone(loaded: LoadedModel, shelf: Shelf) -> None:
    opener = Opener(loaded, CONFIG, shelf.cache)
    with pytest.raises(ConfigError, match="mask=mine names nothing that is stored"):
        opener.find(TOKENS, "report.txt")
    assert shelf.files == []
