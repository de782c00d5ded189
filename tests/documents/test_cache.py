"""The document cache: the same answer from a file, and never an answer from a wrong one."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from leankv_mlx.cache import container
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents import cache as module
from leankv_mlx.documents.cache import DocumentCache, Key, cache_limit, model_identity
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.errors import CacheFileError, UsageError
from leankv_mlx.mlx_lm import LoadedModel, attach, load, make_caches
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK, prefill
from leankv_mlx.resources import demo_model
from tests.cache.prompt_files import content

ROOT = Path(__file__).parents[2]
TOKENS = [1, *(i * 37 % 4000 + 6 for i in range(200))]


class Shelf:
    """A cache in a folder of its own, with the notes that it made."""

    def __init__(self, folder: Path, limit: int = 10**9) -> None:
        self.notes: list[str] = []
        self.cache = DocumentCache(self.notes.append, folder, limit)

    @property
    def files(self) -> list[Path]:
        return sorted(self.cache.place.glob("*.safetensors"))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "documents")


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    found = load()
    with attach(found.model, "leankv:window=32"):
        yield found


CONFIG = CompressionConfig(window=32)
KEY = Key("model", "leankv:k4v4,window=32", tuple(TOKENS), PREFILL_CHUNK)


def read(loaded: LoadedModel, tokens: list[int] = TOKENS) -> list[Any]:
    caches = make_caches(loaded.model)
    prefill(loaded.model, tokens, caches, lambda done, total: None)
    return caches


def reopened(shelf: Shelf, loaded: LoadedModel, key: Key = KEY) -> list[Any] | None:
    return shelf.cache.load(key, "report.txt", make_caches(loaded.model))


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
    assert module.kv_name(CompressionConfig(backend="reference")) == "leankv:k4v4"
    assert module.kv_name(None) == "none"


def test_another_version_looks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.digest
    monkeypatch.setattr(module, "__version__", "9.9")
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
    entry = found[KEY.digest]
    assert (entry.document, entry.model, entry.kv) == ("report.txt", "demo", KEY.kv)
    assert entry.tokens == len(TOKENS)
    assert entry.nbytes == shelf.cache.path(KEY).stat().st_size
    assert shelf.cache.remove(["junk", "missing"]) == 4
    assert [path.stem for path in shelf.files] == [KEY.digest]


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


# Failures


def test_a_full_disk_is_a_note(
    shelf: Shelf, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    assert not shelf.cache.save(KEY, "report.txt", "demo", read(loaded))
    assert shelf.notes == ["report.txt is not kept for the next time: No space left on device."]
    assert [path.name for path in shelf.cache.place.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path, loaded: LoadedModel) -> None:
    (tmp_path / "file").touch()
    shelf = Shelf(tmp_path / "file" / "documents")
    assert not shelf.cache.save(KEY, "report.txt", "demo", read(loaded))
    assert "report.txt is not kept for the next time: Not a directory" in shelf.notes[0]
    assert reopened(shelf, loaded) is None
    assert shelf.cache.entries() == []


def test_a_folder_in_place_of_an_entry(shelf: Shelf, loaded: LoadedModel) -> None:
    shelf.cache.path(KEY).mkdir(parents=True)
    assert reopened(shelf, loaded) is None
    with pytest.raises(CacheFileError, match="cannot be removed"):
        shelf.cache.remove([KEY.digest])


SLOW_SAVE = """
import sys, time
from pathlib import Path
from leankv_mlx.cache import container
from tests.cache.prompt_files import one_of_each
from tests.documents.test_cache import KEY, Shelf

data = container._data

def slow(array):
    print("half-way", flush=True)
    time.sleep(60)

container._data = slow
Shelf(Path(sys.argv[1])).cache.save(KEY, "report.txt", "demo", one_of_each())
"""


def test_what_a_killed_writer_leaves_is_removed_by_the_next(
    shelf: Shelf, loaded: LoadedModel
) -> None:
    command = [sys.executable, "-c", SLOW_SAVE, str(shelf.cache.place)]
    caches = read(loaded)

    def unfinished() -> int:
        return len(list(shelf.cache.place.glob(".*.tmp")))

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as saving:
        assert saving.stdout is not None
        assert saving.stdout.readline() == "half-way\n"
        assert unfinished() == 1
        shelf.cache.save(replace(KEY, model="other"), "other", "demo", caches)
        assert unfinished() == 1  # its writer lives
        saving.send_signal(signal.SIGKILL)
        saving.wait(30)
    assert reopened(shelf, loaded) is None
    assert unfinished() == 1
    shelf.cache.save(KEY, "report.txt", "demo", caches)
    assert unfinished() == 0
    assert content(reopened(shelf, loaded)) == content(caches)
    assert shelf.notes == []


WORKER = """
import sys
from pathlib import Path
from tests.cache.prompt_files import filled
from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.documents.cache import DocumentCache, Key

notes, found = [], 0
cache = DocumentCache(notes.append, Path(sys.argv[1]), int(sys.argv[2]))
for round in range(60):
    key = Key("m", "leankv:k4v4", (1,) * 150, round % 5)
    if cache.load(key, "x", [CompressedKVCache()]) is None:
        cache.save(key, "x", "m", [filled(CompressedKVCache(), 150, seed=round % 5)])
    else:
        found += 1
    if round % 20 == 7:
        cache.remove([key.digest])
print(found, notes)
"""


def test_two_processes_write_open_and_remove_the_same_entries(tmp_path: Path) -> None:
    for limit in (10**9, 60_000):  # with and without having to make room
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(limit)]
        both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
        for process in both:
            out, _ = process.communicate(timeout=120)
            found, _, notes = out.decode().partition(" ")
            assert process.returncode == 0
            assert notes == "[]\n"
            assert int(found) > 0 or limit == 60_000  # the other may always have made room
    assert not list(tmp_path.glob(".*.tmp"))


def test_threads_of_one_process(shelf: Shelf, loaded: LoadedModel) -> None:
    caches = copy.deepcopy(read(loaded))
    mx.eval([cache.state for cache in caches])
    with_lock = [
        threading.Thread(target=shelf.cache.save, args=(KEY, "x", "demo", caches)) for _ in range(2)
    ]
    for thread in with_lock:
        thread.start()
    for thread in with_lock:
        thread.join(30)
    assert content(reopened(shelf, loaded)) == content(caches)


# Files that are whole and still wrong, and files that are not ours.


@pytest.mark.parametrize("error", [OverflowError("x" * 999), RuntimeError("a\nb"), MemoryError()])
def test_an_entry_that_fails_in_any_way_is_removed_and_read_anew(
    error: Exception, shelf: Shelf, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same failure at every question: what was kept must never stand in the way."""
    assert shelf.cache.save(KEY, "report.txt", "demo", read(loaded))

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(module, "load_prompt_cache", fail)
    assert reopened(shelf, loaded) is None
    assert shelf.files == []
    assert len(shelf.notes) == 1 and "\n" not in shelf.notes[0] and len(shelf.notes[0]) < 300
    assert type(error).__name__ in shelf.notes[0]


@pytest.mark.parametrize("kv", ["leankv:window=32", "none"])
def test_an_entry_of_other_shapes_is_removed_and_read_anew(
    kv: str, shelf: Shelf, loaded: LoadedModel
) -> None:
    """ShapeError at every question: the right key and digest, and heads that the model has not."""
    config = None if kv == "none" else CompressionConfig.parse(kv)
    plain = load()
    with attach(plain.model, config) if config else nullcontext():
        opener = Opener(plain, config, shelf.cache)
        right = opener.open(TOKENS, "report.txt", lambda done, total: None)
        caches = make_caches(plain.model)
        for cache in caches:
            rows = mx.random.normal((1, 5, len(TOKENS), 32))
            cache.update_and_fetch(rows, rows)
        assert shelf.cache.save(opener._key(TOKENS), "report.txt", "demo", caches)
        again = opener.open(TOKENS, "report.txt", lambda done, total: None)
        assert not again.cached
        assert "other shapes" in shelf.notes[0]
        assert content(again.caches) == content(right.caches)
        assert opener.open(TOKENS, "report.txt", lambda done, total: None).cached


def test_making_room_removes_entries_of_ours_only(tmp_path: Path, loaded: LoadedModel) -> None:
    """A file of the user in the folder of the cache was the least recently used entry."""
    shelf = Shelf(tmp_path)
    users = [tmp_path / name for name in ("model.safetensors", ".draft.safetensors.1.tmp")]
    for file in users:
        file.write_bytes(b"precious" * 1000)
        os.utime(file, (1, 1))
    caches = read(loaded)
    keys = [replace(KEY, model=str(i)) for i in range(3)]
    shelf.cache.save(keys[0], "0", "demo", caches)
    size = shelf.cache.path(keys[0]).stat().st_size
    shelf.cache.limit = size + size // 2
    for key in keys[1:]:
        assert shelf.cache.save(key, "x", "demo", caches)
    assert [path.exists() for path in map(shelf.cache.path, keys)] == [False, False, True]
    assert all(file.exists() for file in users)


def test_an_entry_that_cannot_be_removed_makes_no_room(tmp_path: Path, loaded: LoadedModel) -> None:
    shelf = Shelf(tmp_path)
    caches = read(loaded)
    first, second, third = (replace(KEY, model=str(i)) for i in range(3))
    shelf.cache.save(first, "0", "demo", caches)
    size = shelf.files[0].stat().st_size
    shelf.cache.path(second).mkdir()
    os.utime(shelf.cache.path(second), (1, 1))
    shelf.cache.limit = size + 100
    assert shelf.cache.save(third, "x", "demo", caches)
    assert not shelf.cache.path(first).exists()


def test_rm_all_leaves_what_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from leankv_mlx.cli.app import run

    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    place = DocumentCache().place
    place.mkdir(parents=True)
    for name in ("mine", KEY.digest):
        (place / f"{name}.safetensors").write_bytes(b"x")
    assert run(["cache", "rm", "--all"]) == 0
    assert capsys.readouterr().out.startswith("removed 1,")
    assert [path.name for path in place.glob("*.safetensors")] == ["mine.safetensors"]
