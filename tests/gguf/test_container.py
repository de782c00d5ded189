"""The reader of GGUF headers: what it reads, and that nothing in a file is trusted."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from leankv_mlx.models.container import FlawError, Header, has_magic, open_file, read_header
from tests.gguf.files import TINY, built, gguf_weights, write


def header(path: Path) -> Header:
    with open_file(path) as file:
        return read_header(file)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


def file_of(entries: list[bytes], tensors: list[bytes], data: int = 256, version: int = 3) -> bytes:
    head = b"GGUF" + u32(version) + u64(len(tensors)) + u64(len(entries))
    body = head + b"".join(entries) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(data)


def test_it_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    tiny, path = TINY["llama"], tmp_path / "a.gguf"
    more = {"general.languages": ["de", "en"], "general.numbers": [1, 2, 3], "general.yes": True}
    write(path, tiny, gguf_weights(tiny, built(tiny)), lambda name: "Q4_1", more)
    found = header(path)
    assert found.metadata["llama.rope.freq_base"] == 10000.0
    assert found.metadata["general.languages"] == ["de", "en"]
    assert found.metadata["general.numbers"].tolist() == [1, 2, 3]
    assert found.metadata["general.yes"] is True
    expected = {row.name: row for row in GGUFReader(path).tensors}
    assert found.tensors.keys() == expected.keys()
    for name, row in found.tensors.items():
        theirs = expected[name]
        assert row.shape == tuple(map(int, reversed(theirs.shape)))
        assert (row.kind, row.offset) == (theirs.tensor_type.name, int(theirs.data_offset))
        assert row.nbytes == int(theirs.n_bytes)


def test_version_2_is_read_and_other_files_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(file_of([], [tensor("x", (64,))], version=2))
    assert header(path).tensors["x"].shape == (64,)
    assert has_magic(path)
    assert not has_magic(tmp_path)
    assert not has_magic(tmp_path / "nosuch")
    os.mkfifo(tmp_path / "pipe")
    assert not has_magic(tmp_path / "pipe")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut off"),
    "magic alone": (b"GGUF", "cut off"),
    "another kind": (b"GGML" + bytes(100), "no GGUF file"),
    "version 1": (file_of([], [], version=1), "GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
    "many tensors": (b"GGUF" + u32(3) + u64(1 << 60) + u64(0) + bytes(99), "more than the file"),
    "many entries": (b"GGUF" + u32(3) + u64(0) + u64(1 << 60) + bytes(99), "more than the file"),
    "long key": (b"GGUF" + u32(3) + u64(0) + u64(1) + u64(1 << 62) + bytes(99), "more than"),
    "long text": (file_of([text("a") + u32(8) + u64(1 << 40)], []), "more than the file"),
    "no UTF-8": (file_of([entry("a", 8, text(b"\xff\xfe"))], []), "no UTF-8"),
    "long array": (file_of([entry("a", 9, u32(4) + u64(1 << 61))], []), "more than the file"),
    "many texts": (file_of([entry("a", 9, u32(8) + u64(1 << 61))], []), "more than the file"),
    "nested": (file_of([entry("a", 9, u32(9) + u64(1) + u32(4) + u64(1))], []), "of arrays"),
    "unknown type": (file_of([entry("a", 13, u64(0))], []), "unknown type 13"),
    "no bool": (file_of([entry("a", 7, b"\x02")], []), "neither 0 nor 1"),
    "same key": (file_of([entry("a", 4, u32(1))] * 2, []), "two entries 'a'"),
    "alignment 0": (file_of([entry("general.alignment", 4, u32(0))], []), "alignment is 0"),
    "alignment 48": (file_of([entry("general.alignment", 4, u32(48))], []), "alignment is 48"),
    "alignment -8": (
        file_of([entry("general.alignment", 5, struct.pack("<i", -8))], []),
        "alignment is -8",
    ),
    "same tensor": (file_of([], [tensor("x", (8,)), tensor("x", (8,), 0, 32)]), "two tensors 'x'"),
    "overlap": (file_of([], [tensor("x", (16,)), tensor("y", (8,), 0, 32)]), "overlaps"),
    "behind the end": (file_of([], [tensor("x", (65,))]), "goes on behind its end"),
    "far away": (file_of([], [tensor("x", (8,), 0, (1 << 64) - 32)]), "goes on behind its end"),
    "overflow": (file_of([], [tensor("x", (1 << 33, 1 << 33))]), "goes on behind its end"),
    "not aligned": (file_of([], [tensor("x", (8,), 0, 4)]), "multiple of 32"),
    "zero": (file_of([], [tensor("x", (8, 0))]), "impossible shape"),
    "half a block": (file_of([], [tensor("x", (48,), 2)]), "impossible shape"),
    "no dimension": (file_of([], [tensor("x", ())]), "has 0 dimensions"),
    "many dimensions": (file_of([], [tensor("x", (1,) * 5)]), "has 5 dimensions"),
    "unknown tensor type": (file_of([], [tensor("x", (8,), 4)]), "unknown type 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(FlawError, match=reason):
        header(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    tiny, path = TINY["phi3, longrope"], tmp_path / "a.gguf"
    write(path, tiny, gguf_weights(tiny, built(tiny)), lambda name: "Q4_0")
    whole = path.read_bytes()
    first = min(row.offset for row in header(path).tensors.values())
    for end in [*range(0, first, 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(FlawError):
            header(path)


def many(count: int, one: bytes) -> bytes:
    """A file that is nothing but texts, whose objects would take seven times the file."""
    return file_of([entry("a", 9, u32(8) + u64(count) + one * count)], [])


def many_entries(count: int) -> bytes:
    return file_of([entry(f"{at:x}", 0, b"\x01") for at in range(count)], [])


def many_tensors(count: int) -> bytes:
    return file_of([], [tensor(f"{at:x}", (1,)) for at in range(count)])


@pytest.mark.parametrize(
    "content",
    [
        many(400_000, text("ab")),
        many(200_000, text("é€😀")),
        many_entries(200_000),
        many_tensors(100_000),
        file_of([entry("a", 8, text("😀" + 20_000_000 * "a"))], []),
        file_of([entry("a", 9, u32(0) + u64(1 << 22) + bytes(1 << 22))], []),
    ],
    ids=["texts", "wide texts", "entries", "tensors", "one wide text", "bytes"],
)
def test_nothing_takes_more_than_twice_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    size = len(content)
    del content
    header_or_flaw(path)  # what is imported once does not count
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        header_or_flaw(path)
        assert time.perf_counter() - begin < 20
        assert tracemalloc.get_traced_memory()[1] < 2 * size + (1 << 20)
    finally:
        tracemalloc.stop()


def header_or_flaw(path: Path) -> Any:
    try:
        return header(path)
    except FlawError as error:
        return error


def test_numbers_of_an_array_are_a_numpy_array(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    numbers = np.array([1.5, -2.0], "<f8")
    path.write_bytes(file_of([entry("a", 9, u32(12) + u64(2) + numbers.tobytes())], []))
    assert np.array_equal(header(path).metadata["a"], numbers)
