"""Bases of a model and their files: what comes back, what is refused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import bases, container, masks
from leankv_mlx.cache.bases import FILES, KIND, Bases, digest_of
from leankv_mlx.codec.basis import Basis
from leankv_mlx.errors import CalibrationError, ConfigError
from leankv_mlx.settings import Named
from tests.bases import basis

MODEL = "model-1"
TEXTS = {"model": MODEL, "name": "small", "notes": "{}"}


def made(layers: int = 3, seed: int = 0, dim: int = 32) -> Bases:
    found = tuple(basis(2, dim, seed=10 * seed + i) for i in range(layers))
    return Bases(found, MODEL, "small", {"seed": str(seed), "text": "a \u00fc\n"})


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bases, "shipped", lambda: tmp_path / "shipped")
    return tmp_path / "home"


def refused(model: str, named: Named) -> str:
    with pytest.raises(CalibrationError) as error:
        FILES.find(model, "large", named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_holds_all_of_it_bit_for_bit(own_home: Path) -> None:
    found = made()
    path = FILES.save(found, "mine")
    assert path == own_home / "bases" / "mine.safetensors"
    assert path.stat().st_size < 3 * 2 * 32 * 32 * 2 + 1000  # two bytes a number
    again = FILES.find(MODEL, "small", Named("mine", found.digest))
    assert again.layers == found.layers and again.digest == found.digest
    assert (again.model, again.name, again.notes) == (found.model, found.name, found.notes)
    for ours, theirs in zip(found.layers, again.layers, strict=True):
        assert mx.array_equal(ours.inverse, theirs.inverse)


def test_digests_tell_bases_apart_and_nothing_else() -> None:
    found = made()
    assert found.digest == made().digest == digest_of(found.layers) and len(found.digest) == 8
    others = [made(2), made(seed=1), Bases(found.layers[::-1])]
    assert len({found.digest, *(other.digest for other in others)}) == 4
    assert Bases(found.layers, "another").digest == found.digest
    names_what_was_stored = Basis(np.eye(32, dtype=np.float32)[None], np.ones((1, 32)))
    assert digest_of([names_what_was_stored]) == "8020b8fb"


def test_what_is_missing_of_another_model_or_learned_anew_is_told_with_the_way_out() -> None:
    told = refused(MODEL, Named("mine"))
    assert told == "there is no basis 'mine'; run leankv learn rotations MODEL -o mine."
    FILES.save(made(), "mine")
    told = refused("model-2", Named("mine"))
    assert "the basis 'mine' is for small, not for large; run leankv learn rotations" in told
    told = refused(MODEL, Named("mine", "01234567"))
    assert f"basis=mine@01234567 was learned anew since and is mine@{made().digest} now" in told


def test_the_users_own_come_before_those_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "shipped").mkdir()
    FILES.save(made(), "mine").rename(tmp_path / "shipped" / "mine.safetensors")
    assert FILES.load("mine").digest == made().digest
    FILES.save(made(seed=1), "mine")
    assert FILES.load("mine").digest == made(seed=1).digest


def test_a_basis_is_no_mask_and_a_mask_no_basis(own_home: Path) -> None:
    FILES.save(made(), "mine")
    (own_home / "masks").mkdir()
    (own_home / "bases" / "mine.safetensors").rename(own_home / "masks" / "mine.safetensors")
    with pytest.raises(CalibrationError, match="it is no mask of leankv"):
        masks.load("mine")
    masks.save(masks.Masks.of(np.zeros((1, 1, 32), np.float32), 0.5), "yours")
    (own_home / "masks" / "yours.safetensors").rename(own_home / "bases" / "yours.safetensors")
    assert "it is no basis of leankv" in refused(MODEL, Named("yours"))


def test_a_file_that_is_damaged_anywhere_is_refused() -> None:
    path = FILES.save(made(1), "mine")
    good = path.read_bytes()
    for place in range(0, len(good), 97):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        assert "cannot be used" in refused(MODEL, Named("mine"))
    for size in (0, 7, 200, len(good) - 1):
        path.write_bytes(good[:size])
        assert "leankv learn rotations MODEL -o mine" in refused(MODEL, Named("mine"))
    path.write_bytes(good)
    assert FILES.load("mine").digest == made(1).digest


STORED = {
    "matrices": np.stack([np.array(layer.matrix) for layer in made().layers]),
    "costs": np.stack([np.array(layer.costs) for layer in made().layers]),
}
MATRICES, COSTS = STORED.values()
WRONG: dict[str, tuple[dict[str, np.ndarray], dict[str, str]]] = {
    "floats of 32 bits": (STORED | {"matrices": MATRICES.astype(np.float32)}, {}),
    "one layer without its dimension": ({name: array[0] for name, array in STORED.items()}, {}),
    "no layers": ({name: array[:0] for name, array in STORED.items()}, {}),
    "no heads": ({name: array[:, :0] for name, array in STORED.items()}, {}),
    "matrices that are not square": (STORED | {"matrices": MATRICES[..., :16]}, {}),
    "singular matrices": (STORED | {"matrices": 0 * MATRICES}, {}),
    "numbers that are none": (STORED | {"matrices": MATRICES * np.float16("nan")}, {}),
    "costs of another dtype": (STORED | {"costs": COSTS.astype(np.float32)}, {}),
    "costs of other layers": (STORED | {"costs": COSTS[:-1]}, {}),
    "costs below 0": (STORED | {"costs": -COSTS}, {}),
    "a tensor less": ({"matrices": MATRICES}, {}),
    "a tensor more": (STORED | {"more": np.zeros(3, np.float32)}, {}),
    "no tensor": ({}, {}),
    "notes that are none": (STORED, {"notes": "[]"}),
    "notes without an end": (STORED, {"notes": "{"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_whose_content_contradicts_itself_is_refused(what: str) -> None:
    path = FILES.save(made(), "mine")
    tensors = {name: mx.array(array) for name, array in WRONG[what][0].items()}
    container.write(path, tensors, TEXTS | WRONG[what][1], KIND)
    assert "it is damaged" in refused(MODEL, Named("mine"))


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_lacks_a_part_is_refused(name: str) -> None:
    path = FILES.save(made(), "mine")
    texts = {n: text for n, text in TEXTS.items() if n != name}
    container.write(path, {n: mx.array(array) for n, array in STORED.items()}, texts, KIND)
    assert "it is damaged" in refused(MODEL, Named("mine"))


def test_what_makes_no_bases(own_home: Path) -> None:
    for layers in ((), (basis(2, 32), basis(2, 64)), (basis(2, 32), basis(1, 32))):
        with pytest.raises(ConfigError):
            Bases(layers)
    with pytest.raises(ConfigError, match="a basis cannot be called"):
        FILES.save(made(), "../mine")
    assert not own_home.exists()
