"""Masks of a model: which groups are kept of what was learned, their files, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import container, masks
from leankv_mlx.cache.masks import KIND, Masks, digest_of, find, load, save
from leankv_mlx.codec.channels import Channels
from leankv_mlx.errors import CalibrationError, ConfigError
from leankv_mlx.settings import Named

MODEL = "model-1"


def made(shape: tuple[int, int, int] = (2, 3, 64), ratio: float = 0.5, seed: int = 0) -> Masks:
    alphas = np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)
    return Masks.of(alphas, ratio, MODEL, "small", {"seed": str(seed), "text": "a \u00fc\n"})


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(masks, "shipped", lambda: tmp_path / "shipped")
    return tmp_path / "home"


# Which groups are kept.


def test_the_best_groups_of_the_whole_model_are_kept() -> None:
    alphas = np.zeros((2, 2, 64), np.float32)
    alphas[0, 0] = 0.1
    alphas[0, 1, 1::2] = 0.9  # every other channel
    alphas[1, 0, 32:] = 0.8
    alphas[1, 1, :] = np.linspace(1, 0, 64)  # means 0.75 and 0.25
    found = Masks.of(alphas, 0.5)
    assert found.groups.tolist() == [[0, 1], [1, 2]]
    assert found.order[0, 1].tolist() == [*range(1, 64, 2), *range(0, 64, 2)]
    assert found.order[1, 0].tolist() == [*range(32, 64), *range(32)]
    assert Masks.of(alphas, 0.875).groups.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 128])
@pytest.mark.parametrize("ratio", [0, 0.3, 0.7, 1])
def test_so_many_groups_are_kept_and_none_is_worse_than_one_that_is_not(
    dim: int, ratio: float
) -> None:
    found = made((3, 2, dim), ratio, seed=dim)
    groups = -(-dim // 32)
    assert found.groups.sum() == round((1 - ratio) * 3 * 2 * groups)
    ranked = np.take_along_axis(found.alphas, found.order, axis=-1)
    assert (np.diff(ranked, axis=-1) <= 0).all()
    kept, left = [], []
    for head, count in zip(ranked.reshape(-1, dim), found.groups.ravel(), strict=True):
        for group in range(groups):
            worth = head[32 * group : 32 * group + 32].mean()
            (kept if group < count else left).append(worth)
    assert min(kept, default=1) >= max(left, default=0) - 1e-6


@pytest.mark.parametrize("dim", [64, 80])
def test_of_equals_the_first_is_kept(dim: int) -> None:
    alphas = np.full((6, 4, dim), 0.1, np.float32)
    found = Masks.of(alphas, 0.5)
    groups = -(-dim // 32)
    assert found.groups.tolist() == [[groups] * 4] * 3 + [[0] * 4] * 3
    assert (found.order == np.arange(dim)).all()


def test_digests_tell_masks_apart_and_nothing_else() -> None:
    mask = made()
    assert mask.digest == made().digest and len(mask.digest) == 8
    assert mask.digest == replace(mask, model="other", notes={}).digest
    others = [made(ratio=0.4), made(seed=1), made((3, 2, 64))]
    swapped = mask.order.copy()
    swapped[0, 0, :2] = swapped[0, 0, 1::-1]
    layers = tuple(map(Channels.of, swapped, mask.groups))
    others.append(replace(mask, layers=layers))
    assert len({mask.digest, *(other.digest for other in others)}) == 5
    assert digest_of([Channels(((*range(32),),), (1,))]) == "98f4ae2d"  # names what was stored


REFUSED = {
    "no layers": lambda: Masks((), np.zeros((0, 1, 32), np.float32), 0.5),
    "alphas of another shape": lambda: replace(made(), alphas=np.zeros((2, 3, 32), np.float32)),
    "layers of two kinds": lambda: replace(
        made(), layers=(made().layers[0], made((1, 2, 64)).layers[0])
    ),
    "alphas that are no numbers": lambda: Masks.of(np.full((1, 1, 32), np.nan, np.float32), 0.5),
    "alphas above 1": lambda: Masks.of(np.full((1, 1, 32), 1.5, np.float32), 0.5),
    "alphas below 0": lambda: Masks.of(np.full((1, 1, 32), -0.5, np.float32), 0.5),
    "doubles": lambda: Masks.of(np.zeros((1, 1, 32)), 0.5),  # type: ignore[arg-type]
    "a ratio above 1": lambda: made(ratio=1.1),
    "a ratio that is no number": lambda: made(ratio=float("nan")),
    "no channels": lambda: Masks.of(np.zeros((1, 1, 0), np.float32), 0.5),
    "no heads": lambda: Masks.of(np.zeros((4, 32), np.float32), 0.5),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_mask(what: str) -> None:
    with pytest.raises(ConfigError) as error:
        REFUSED[what]()
    assert "\n" not in str(error.value)


# Files.


def test_a_file_holds_all_of_it(own_home: Path) -> None:
    mask = made((2, 3, 48))
    path = save(mask, "mine")
    assert path == own_home / "masks" / "mine.safetensors"
    found = find(MODEL, "small", Named("mine", mask.digest))
    assert found.layers == mask.layers and found.digest == mask.digest
    assert (found.alphas == mask.alphas).all() and found.alphas.dtype == np.float32
    assert (found.ratio, found.model, found.name) == (0.5, MODEL, "small")
    assert found.notes == {"seed": "0", "text": "a \u00fc\n"}
    assert not list(path.parent.glob(".*"))
    save(made(ratio=0.7), "mine")  # replaces it
    assert find(MODEL, "small", Named("mine")).ratio == 0.7


def refused(model: str, mask: Named) -> str:
    with pytest.raises(CalibrationError) as error:
        find(model, "large", mask)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_or_for_another_model_is_told_with_the_way_out() -> None:
    assert "no mask 'mine'; run leankv learn masks MODEL -o mine" in refused(MODEL, Named("mine"))
    save(made(), "mine")
    told = refused("model-2", Named("mine"))
    assert "is for small, not for large; run leankv learn masks MODEL" in told


def test_a_mask_that_was_learned_anew_is_not_taken_for_the_old_one() -> None:
    old, new = made(), made(seed=1)
    save(new, "mine")
    told = refused(MODEL, Named("mine", old.digest))
    assert f"mask=mine@{old.digest} was learned anew" in told
    assert f"use mask=mine@{new.digest}, or mask=mine" in told
    assert load("mine").digest == new.digest


def test_the_users_own_come_before_those_of_the_package(tmp_path: Path) -> None:
    mask = made()
    (tmp_path / "shipped").mkdir()
    save(mask, "mine").rename(tmp_path / "shipped" / "mine.safetensors")
    assert load("mine").digest == mask.digest
    save(made(seed=1), "mine")
    assert load("mine").digest == made(seed=1).digest


def test_names_are_no_paths(own_home: Path) -> None:
    for name in ("../mine", "", "a/b", "a.b"):
        with pytest.raises(ConfigError):
            save(made(), name)
        with pytest.raises(ConfigError):
            load(name)
    assert not own_home.exists()


def test_a_file_that_is_damaged_anywhere_is_refused() -> None:
    path = save(made((1, 1, 32)), "mine")
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        assert "cannot be used" in refused(MODEL, Named("mine"))
    for size in (0, 7, 200, len(good) - 1):
        path.write_bytes(good[:size])
        told = refused(MODEL, Named("mine"))
        assert "cannot be used" in told and "leankv learn masks MODEL -o mine" in told
    path.write_bytes(good)
    assert load("mine").groups.shape == (1, 1)


def arrays() -> dict[str, np.ndarray]:
    mask = made((2, 2, 64))
    return {"order": mask.order, "groups": mask.groups, "alphas": mask.alphas}


def twice(order: np.ndarray) -> np.ndarray:
    order = order.copy()
    order[1, 1, 0] = order[1, 1, 1]
    return order


TEXTS = {"model": MODEL, "name": "small", "ratio": "0.5", "notes": "{}"}
WRONG: dict[str, tuple[dict[str, np.ndarray], dict[str, str]]] = {
    "a channel twice": ({"order": twice(arrays()["order"])}, {}),
    "a channel that is not there": ({"order": arrays()["order"] + 1}, {}),
    "more groups than there are": ({"groups": arrays()["groups"] + 3}, {}),
    "fewer than none": ({"groups": arrays()["groups"] - 3}, {}),
    "groups of too few heads": ({"groups": arrays()["groups"][:, :1]}, {}),
    "groups of too few layers": ({"groups": arrays()["groups"][:1]}, {}),
    "floats for an order": ({"order": arrays()["order"].astype(np.float32)}, {}),
    "floats for groups": ({"groups": arrays()["groups"].astype(np.float32)}, {}),
    "no heads": ({name: array[:, :0] for name, array in arrays().items()}, {}),
    "an order of one layer": ({"order": arrays()["order"][0]}, {}),
    "alphas that are no numbers": ({"alphas": arrays()["alphas"] * np.float32("nan")}, {}),
    "alphas above 1": ({"alphas": arrays()["alphas"] + np.float32(1)}, {}),
    "alphas of fewer layers": ({"alphas": arrays()["alphas"][:1]}, {}),
    "a tensor more": ({"more": np.zeros(3, np.float32)}, {}),
    "a ratio above 1": ({}, {"ratio": "1.5"}),
    "a ratio that is no number": ({}, {"ratio": "half"}),
    "notes that are none": ({}, {"notes": "[]"}),
    "notes that are no texts": ({}, {"notes": '{"seed": 1}'}),
    "notes without an end": ({}, {"notes": "{"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_whose_content_contradicts_itself_is_refused(what: str) -> None:
    path = save(made(), "mine")
    tensors = {name: mx.array(array) for name, array in (arrays() | WRONG[what][0]).items()}
    container.write(path, tensors, TEXTS | WRONG[what][1], KIND)
    assert "it is damaged" in refused(MODEL, Named("mine"))


@pytest.mark.parametrize("name", ["order", "groups", "alphas", *TEXTS])
def test_a_file_that_lacks_a_part_is_refused(name: str) -> None:
    path = save(made(), "mine")
    tensors = {n: mx.array(array) for n, array in arrays().items() if n != name}
    container.write(path, tensors, {n: text for n, text in TEXTS.items() if n != name}, KIND)
    assert "it is damaged" in refused(MODEL, Named("mine"))


def test_files_of_another_kind_or_none_at_all() -> None:
    path = save(made(), "mine")
    container.write(path, {}, {})
    assert "no mask of leankv" in refused(MODEL, Named("mine"))
    path.unlink()
    path.mkdir()
    assert "mine.safetensors" in refused(MODEL, Named("mine"))


def test_a_place_that_cannot_be_written(own_home: Path) -> None:
    own_home.mkdir()
    (own_home / "masks").write_text("a file")
    with pytest.raises(CalibrationError, match="cannot write"):
        save(made(), "mine")
    assert "cannot read" in refused(MODEL, Named("mine"))
