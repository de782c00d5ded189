"""Whatever happens to the files of the document cache, a question is answered, and right."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from leankv_mlx.cache import container
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.errors import CacheFileError
from leankv_mlx.mlx_lm import LoadedModel, attach, load, make_caches
from tests.cache.prompt_files import content
from tests.documents.shelf import KEY, NAME, ROOT, TOKENS, Shelf, read, reopened


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "documents")


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    found = load()
    with attach(found.model, "leankv:window=32"):
        yield found


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
        shelf.cache.remove([NAME])


SLOW_SAVE = """
import sys, time
from pathlib import Path
from leankv_mlx.cache import container
from tests.cache.prompt_files import one_of_each
from tests.documents.shelf import KEY, Shelf

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
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.serving.keys import Key

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

    monkeypatch.setattr(shelf.cache, "_files", shelf.cache._files._replace(load=fail))
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
    for name in ("mine", NAME, KEY.digest):
        (place / f"{name}.safetensors").write_bytes(b"x")
    assert run(["cache", "rm", "--all"]) == 0
    assert capsys.readouterr().out.startswith("removed 2,")
    assert [path.name for path in place.glob("*.safetensors")] == ["mine.safetensors"]
