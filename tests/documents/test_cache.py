"""The document cache: the same answer from a file, and never an answer from a wrong one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from leankv_mlx.cache import container
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.errors import UsageError
from leankv_mlx.mlx_lm import LoadedModel, attach, load, make_caches
from leankv_mlx.mlx_lm.stored_prompts import model_identity
from leankv_mlx.resources import demo_model
from leankv_mlx.serving import keys
from leankv_mlx.serving.entries import cache_limit
from leankv_mlx.serving.keys import Key, kv_name
from tests.cache.prompt_files import content
from tests.documents.shelf import KEY, NAME, TOKENS, Shelf, read, reopened


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "documents")


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    found = load()
    with attach(found.model, "leankv:window=32"):
        yield found


@pytest.mark.parametrize("kv", ["leankv:window=32", "leankv:k3v2,equalize=on", "none"])
def test_a_prefix_from_its_file_is_the_one_that_was_read(kv: str, shelf: Shelf) -> None:
    loaded = load()
    config = None if kv == "none" else CompressionConfig.parse(kv)
    opener = Opener(loaded, config, shelf.cache)
    steps: list[tuple[int, int]] = []
    attachment = attach(loaded.model, config) if config else None
    if attachment:
        attachment.start()
    first = opener.open(TOKENS, "report.txt", lambda *step: steps.append(step))
    assert steps == [(0, 201), (201, 201)]
    again = opener.open(TOKENS, "report.txt", lambda *step: steps.append(step))
    assert (first.cached, again.cached, len(steps)) == (False, True, 2)
    for tokens in ([5], [7] * 40, [9]):
        logits = [loaded.model(mx.array([tokens]), cache=x.caches) for x in (first, again)]
        assert mx.array_equal(*logits)
    if attachment:
        attachment.stop()
    assert shelf.notes == []
    assert len(shelf.files) == 1


def test_everything_that_matters_is_in_the_key() -> None:
    changed = [
        replace(KEY, model="another"),
        replace(KEY, kv="leankv:k4v3,window=32"),
        replace(KEY, prefix=(*TOKENS[:-1], 6)),
        replace(KEY, prefix=tuple(TOKENS[:-1])),
        replace(KEY, chunk=256),
    ]
    assert len({key.digest for key in [KEY, *changed]}) == 6
    assert kv_name(CompressionConfig(backend="reference")) == "leankv:k4v4"
    assert kv_name(None) == "none"


def test_another_version_looks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.digest
    monkeypatch.setattr(keys, "__version__", "9.9")
    other = KEY.digest
    monkeypatch.undo()
    monkeypatch.setattr(container, "VERSION", 99)
    assert len({before, other, KEY.digest}) == 3


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((demo_model() / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    stat = weights.stat()
    before = model_identity(tmp_path)
    assert before == model_identity(tmp_path)
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    edited = model_identity(tmp_path)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert len({before, edited, model_identity(tmp_path)}) == 3


def test_an_entry_under_another_name_is_not_used(shelf: Shelf, loaded: LoadedModel) -> None:
    assert shelf.cache.save(KEY, "report.txt", "demo", read(loaded))
    other = replace(KEY, model="another")
    shelf.cache.path(KEY).rename(shelf.cache.path(other))
    assert reopened(shelf, loaded, other) is None
    assert len(shelf.notes) == 1
    assert "report.txt is not used and made anew: it belongs to another" in shelf.notes[0]
    assert shelf.files == []


@pytest.mark.parametrize("wrong", ["layers", "setting", "tokens"])
def test_an_entry_that_is_not_what_it_says_is_not_used(
    wrong: str, shelf: Shelf, loaded: LoadedModel
) -> None:
    caches = read(loaded)
    if wrong == "layers":
        caches = caches[:-1]
    elif wrong == "setting":
        with attach(loaded.model, "leankv:k3v3,window=32"):
            caches = read(loaded)
    else:
        for cache in caches:
            cache.trim(1)
    assert shelf.cache.save(KEY, "report.txt", "demo", caches)
    assert reopened(shelf, loaded) is None
    assert len(shelf.notes) == 1
    assert shelf.files == []


def test_fuzz_an_entry_is_whole_or_it_is_read_again(shelf: Shelf, loaded: LoadedModel) -> None:
    caches = read(loaded)
    assert shelf.cache.save(KEY, "report.txt", "demo", caches)
    path = shelf.cache.path(KEY)
    good, expected = path.read_bytes(), content(caches)
    fresh = make_caches(loaded.model)
    rng = random.Random(1)
    header = 8 + int.from_bytes(good[:8], "little")

    def flipped(low: int, high: int) -> bytes:
        changed = bytearray(good)
        changed[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        return bytes(changed)

    def mutated() -> bytes:
        start, n = rng.randrange(len(good)), rng.randrange(1, 300)
        kind = rng.randrange(6)
        if kind == 0:
            return good[:start]
        if kind == 1:
            return good[:start] + rng.randbytes(n) + good[start + n :]
        if kind == 2:
            return good[:start] + good[start + n :]
        if kind == 3:
            return good[:start] + bytes(n) + good[start:]
        return flipped(0, header) if kind == 4 else flipped(header, len(good))

    cases = 0
    while cases < 600:
        changed = mutated()
        if changed == good:
            continue
        path.write_bytes(changed)
        notes = len(shelf.notes)
        assert shelf.cache.load(KEY, "report.txt", fresh) is None
        assert len(shelf.notes) == notes + 1
        assert not path.exists()
        shelf.cache.entries()
        cases += 1
    assert all("\n" not in line and len(line) < 300 for line in shelf.notes)
    path.write_bytes(good)
    assert content(reopened(shelf, loaded)) == expected


def test_lists_show_damaged_entries_too(shelf: Shelf, loaded: LoadedModel) -> None:
    shelf.cache.save(KEY, "report.txt", "demo", read(loaded))
    (shelf.cache.place / "junk.safetensors").write_bytes(b"junk")
    found = {entry.key: entry for entry in shelf.cache.entries()}
    assert found["junk"].document == ""
    entry = found[NAME]
    assert (entry.document, entry.model, entry.kv) == ("report.txt", "demo", KEY.kv)
    assert entry.tokens == len(TOKENS)
    assert entry.nbytes == shelf.cache.path(KEY).stat().st_size
    assert shelf.cache.remove(["junk", "missing"]) == 4
    assert [path.stem for path in shelf.files] == [NAME]


# Room


def aged(shelf: Shelf, key: Key, seconds: float) -> None:
    now = time.time()
    os.utime(shelf.cache.path(key), (now - seconds, now - seconds))


def test_the_least_recently_used_make_room(tmp_path: Path, loaded: LoadedModel) -> None:
    caches = read(loaded)
    keys = [replace(KEY, model=str(i)) for i in range(4)]
    shelf = Shelf(tmp_path)
    shelf.cache.save(keys[0], "0", "demo", caches)
    size = shelf.files[0].stat().st_size
    shelf.cache.limit = 3 * size + size // 2
    for i in (1, 2):
        shelf.cache.save(keys[i], str(i), "demo", caches)
    for i in range(3):
        aged(shelf, keys[i], 100 - i)
    assert reopened(shelf, loaded, keys[0]) is not None  # now it is the most recent
    shelf.cache.save(keys[3], "3", "demo", caches)
    assert {entry.document for entry in shelf.cache.entries()} == {"0", "2", "3"}
    assert sum(file.stat().st_size for file in shelf.files) <= shelf.cache.limit
    shelf.cache.limit = size // 2
    assert not shelf.cache.save(keys[1], "too large", "demo", caches)
    assert "too large is not kept" in shelf.notes[0]
    assert len(shelf.files) == 3
    shelf.cache.limit = 0
    assert not shelf.cache.save(keys[1], "1", "demo", caches)
    assert reopened(shelf, loaded, keys[3]) is None
    assert len(shelf.notes) == 1


def test_the_limit_is_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEANKV_CACHE_LIMIT", raising=False)
    assert cache_limit() == 10 * 10**9
    monkeypatch.setenv("LEANKV_CACHE_LIMIT", "1.5GB")
    assert cache_limit() == 15 * 10**8
    monkeypatch.setenv("LEANKV_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="LEANKV_CACHE_LIMIT: 'much' is not a size"):
        DocumentCache()
