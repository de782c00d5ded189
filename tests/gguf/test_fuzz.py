"""Mutated GGUF files: each is converted or refused in one line, in bounded time and memory."""

from __future__ import annotations

import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leankv_mlx.errors import LeanKVError
from leankv_mlx.mlx_lm import load
from leankv_mlx.models.container import open_file, read_header
from leankv_mlx.models.conversion import convert
from tests.gguf.files import TINY, built, gguf_weights, write

FEW, MANY = 200, 10_000
SECONDS = 20.0
BESIDES = 24 << 20
"""Bytes that conversion of any file may take: some rows in several forms, the tokenizer."""

KINDS = ("F32", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "BF16")
NUMBERS = (0, 1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, int]]:
    """Files of several architectures, and where their data begins."""
    place = tmp_path_factory.mktemp("seeds")
    found = []
    for name in ("llama, llama3", "gemma3", "phi3, longrope", "qwen2, yarn"):
        path, tiny = place / "seed.gguf", TINY[name]
        weights = gguf_weights(tiny, built(tiny))
        kinds = {tensor: KINDS[at % len(KINDS)] for at, tensor in enumerate(weights)}
        write(path, tiny, weights, kinds.__getitem__)
        with open_file(path) as file:
            begin = min(row.offset for row in read_header(file).tensors.values())
        found.append((path.read_bytes(), begin))
    return found


def mutated(whole: bytes, begin: int, draw: random.Random) -> bytes:
    """One to four changes, most of them in the header."""
    raw = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(begin if draw.random() < 0.9 else len(raw))
        match draw.randrange(7):
            case 0:
                raw[at] ^= 1 << draw.randrange(8)
            case 1:
                raw[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
            case 2:
                raw[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) & 0xFFFFFFFF)
            case 3:
                raw[at : at + 4] = struct.pack("<f", draw.choice((float("nan"), -1.0, 1e30, 0.0)))
            case 4:
                del raw[at : at + draw.randrange(1, 64)]
            case 5:
                raw[at:at] = raw[draw.randrange(begin) :][: draw.randrange(1, 64)]
            case 6:
                del raw[draw.randrange(len(raw)) :]
                break
        begin = min(begin, len(raw))
        if not begin:
            break
    return bytes(raw)


def cases(seeds: list[tuple[bytes, int]], count: int, seed: int) -> Iterator[bytes]:
    draw = random.Random(seed)
    for _ in range(count):
        yield mutated(*draw.choice(seeds), draw)


def refused(call: Callable[[], object]) -> str:
    """Why a call was refused; "" if it was not."""
    try:
        call()
    except LeanKVError as error:
        return str(error)
    return ""


def check(seeds: list[tuple[bytes, int]], place: Path, count: int, seed: int) -> None:
    path, folder = place / "a.gguf", place / "folder"
    path.write_bytes(seeds[0][0])
    convert(path, folder)  # what is imported once does not count
    done = 0
    tracemalloc.start()
    try:
        for number, content in enumerate(cases(seeds, count, seed)):
            path.write_bytes(content)
            shutil.rmtree(folder, ignore_errors=True)
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            begin = time.perf_counter()
            refusal = refused(lambda: convert(path, folder))
            done += not refusal
            assert bool(refusal) != folder.exists(), number
            assert "\n" not in refusal, number
            assert not refusal or str(path) in refusal, number
            assert time.perf_counter() - begin < SECONDS, number
            taken = tracemalloc.get_traced_memory()[1] - held
            assert taken < 2 * len(content) + BESIDES, (number, taken)
    finally:
        tracemalloc.stop()
    assert 0.02 * count < done < 0.8 * count  # the mutations do something, and not everything


def test_mutated_files(seeds: list[tuple[bytes, int]], tmp_path: Path) -> None:
    check(seeds, tmp_path, FEW, seed=1)


@pytest.mark.slow
def test_many_mutated_files(seeds: list[tuple[bytes, int]], tmp_path: Path) -> None:
    check(seeds, tmp_path, MANY, seed=2)


def test_what_was_mutated_and_still_converts_also_loads(
    seeds: list[tuple[bytes, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is refused in one line then."""
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    path, loaded = tmp_path / "a.gguf", 0
    for content in cases(seeds, 60, seed=3):
        path.write_bytes(content)
        refusal = refused(lambda: load(path))
        loaded += not refusal
        assert "\n" not in refusal
    assert loaded
