"""Prompt cache files: exact, atomic, and refused with one line when anything about them is off."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import CompressedKVCache, container
from leankv_mlx.codec.format import TILE
from leankv_mlx.errors import CacheFileError, UnsupportedError
from leankv_mlx.mlx_lm import attach, load, load_prompt_cache, make_caches, save_prompt_cache
from tests.cache.harness import feed, tokens
from tests.cache.prompt_files import (
    content,
    filled,
    masked,
    narrowed,
    one_of_each,
    ragged,
    rows,
    signed,
    taken_apart,
)
from tests.models import TINY

ROOT = Path(__file__).parents[2]


def reloaded(caches: list[Any], folder: Path) -> list[Any]:
    save_prompt_cache(folder / "cache", caches)
    return load_prompt_cache(folder / "cache").caches


SPECS = [
    "leankv",
    "leankv:k3v2,window=32,center=off",
    "leankv:k2v8,rounding=rms,rotation=none,sink_tokens=0",
    "leankv:k4v4,equalize=on",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_reloaded_layer_goes_on_bit_identically(
    spec: str, dtype: mx.Dtype, tmp_path: Path
) -> None:
    ours = filled(CompressedKVCache(spec), 200, dtype=dtype)
    (again,) = reloaded([ours], tmp_path)
    assert content(again) == content(ours)
    for seed, n in enumerate((1, 8, 100, 1), start=500):
        new = rows(n, seed, dtype=dtype), rows(n, seed + 50, dtype=dtype)
        for a, b in zip(ours.update_and_fetch(*new), again.update_and_fetch(*new), strict=True):
            assert mx.array_equal(a, b)
    assert ours.trim(60) == again.trim(60)
    assert content(again) == content(ours)


def test_only_blocks_in_use_are_stored_in_order(tmp_path: Path) -> None:
    ours = filled(CompressedKVCache("leankv:window=32"), 600)
    other = copy.deepcopy(ours)
    ours.trim(300)
    filled(ours, 200, seed=9, step=8)  # its new blocks lie behind those of the copy
    table = ours.layer.body.tables[0]
    steps = np.diff(table.ids)
    assert table.pool.used > table.ids.size and (steps < 0).any() | (steps > 1).any()
    (again,) = reloaded([ours], tmp_path)
    assert content(again) == content(ours) != content(other)
    pool = again.layer.body.tables[0].pool
    assert pool.capacity == pool.used == table.ids.size


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_model_goes_on_bit_identically(name: str, tmp_path: Path) -> None:
    model = TINY[name](dtype=mx.float32)
    with attach(model, "leankv:k4v3,window=32"):
        ours = make_caches(model)
        feed(model, ours, [tokens(150)])
        again = reloaded(ours, tmp_path)
        assert [type(c) for c in again] == [type(c) for c in ours]
        pieces = [tokens(1, 5), tokens(7, 6), tokens(40, 7)]
        np.testing.assert_array_equal(feed(model, again, pieces), feed(model, ours, pieces))


def test_the_demo_model_goes_on_bit_identically(tmp_path: Path) -> None:
    model = load().model
    with attach(model):
        ours = make_caches(model)
        feed(model, ours, [tokens(300)])
        again = reloaded(ours, tmp_path)
        pieces = [*(tokens(1, seed) for seed in range(34)), tokens(50)]
        np.testing.assert_array_equal(feed(model, again, pieces), feed(model, ours, pieces))


def test_every_class_and_the_metadata_come_back(tmp_path: Path) -> None:
    caches = one_of_each()
    save_prompt_cache(tmp_path / "cache", caches, {"model": "näme", "empty": ""})
    loaded = load_prompt_cache(tmp_path / "cache")
    assert content(loaded.caches) == content(caches)
    assert loaded.metadata == {"model": "näme", "empty": ""}
    assert [config.spec() for config in loaded.configs] == [
        "leankv:k4v3,window=32,equalize=off",
        "leankv:k3v2,window=32",
        "leankv:k4v4",
        "leankv:k2v2",
        "leankv:k4v4,window=32,policy=threshold",
        "leankv:k4v3,window=32,mask=some",
        "leankv:k4v4,window=32,mask=some,policy=threshold",
        "leankv:k4v4,mask=some",
        "leankv:k3v3,window=32,basis=some",
        "leankv:k4v4,basis=some",
        "leankv:k4v4,window=32,basis=some,policy=threshold",
    ]


def test_a_file_of_the_version_before_opens_as_it_was(tmp_path: Path) -> None:
    """Its settings do not speak of equalize, which was off by default."""
    plain = [filled(CompressedKVCache("leankv:k4v4,equalize=off"), 200)]
    save_prompt_cache(tmp_path / "cache", plain)
    header, data = taken_apart(tmp_path / "cache")
    layers = header["__metadata__"]["layers"].replace(",equalize=off", "")
    header["__metadata__"] |= {"version": "2", "layers": layers}
    (tmp_path / "old").write_bytes(signed(header, data))
    loaded = load_prompt_cache(tmp_path / "old")
    assert content(loaded.caches) == content(plain)
    assert loaded.configs[0].spec() == "leankv:k4v4,equalize=off"


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "cache.safetensors", one_of_each())
    arrays, metadata = mx.load(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata["format"] == "leankv-prompt-cache"
    assert metadata["version"] == "3"
    assert arrays["0.k"].shape == (2, 150 - 3 * 32, 32)


def test_the_backend_is_no_part_of_the_file(tmp_path: Path) -> None:
    save_prompt_cache(
        tmp_path / "cache", [filled(CompressedKVCache("leankv:backend=reference"), 9)]
    )
    assert b"backend" not in (tmp_path / "cache").read_bytes()
    loaded = load_prompt_cache(tmp_path / "cache", "reference")
    assert loaded.caches[0].backend == "reference"


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot hold a object"):
        save_prompt_cache(tmp_path / "cache", [object()])
    assert not list(tmp_path.iterdir())


# Writing is atomic.


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    save_prompt_cache(path, one_of_each())
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(CacheFileError, match=r"cannot write .*cache: No space left on device"):
        save_prompt_cache(path, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_and_a_folder_as_target(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "cache", tmp_path):
        with pytest.raises(CacheFileError, match="cannot write"):
            save_prompt_cache(path, one_of_each())
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    save_prompt_cache(link, [])
    assert link.is_symlink()
    assert load_prompt_cache(tmp_path / "file").caches == []


SLOW_SAVE = """
import sys, time
from leankv_mlx.cache import container
from leankv_mlx.mlx_lm import save_prompt_cache
from tests.cache.prompt_files import masked, one_of_each

data, written = container._data, []

def slow(array):
    written.append(array)
    if len(written) == 8:
        print("half-way", flush=True)
        time.sleep(60)
    return data(array)

container._data = slow
save_prompt_cache(sys.argv[1], one_of_each())
"""


def test_a_kill_during_a_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save_prompt_cache(path, [filled(CompressedKVCache(), 300)])
    before = path.read_bytes()
    command = [sys.executable, "-c", SLOW_SAVE, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as saving:
        assert saving.stdout is not None
        assert saving.stdout.readline() == "half-way\n"
        assert len(list(tmp_path.iterdir())) == 2
        saving.send_signal(signal.SIGKILL)
        assert saving.wait(30) == -signal.SIGKILL
    assert path.read_bytes() == before
    assert load_prompt_cache(path).caches[0].offset == 300


# Reading trusts nothing.


class Fuzz:
    """One good file, and what becomes of changed ones."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cache"
        self.caches = one_of_each()
        save_prompt_cache(self.path, self.caches, {"model": "m"})
        self.good = self.path.read_bytes()
        self.header, self.data = taken_apart(self.path)
        self.same = signed(copy.deepcopy(self.header), self.data)  # with other blanks
        self.content = content(self.caches)
        self.random = random.Random(1)
        self.messages: set[str] = set()
        self.cases = 0

    def refused(self, changed: bytes, note: object) -> None:
        """The file is refused with one line, at once."""
        if changed in (self.good, self.same):
            return
        self.path.write_bytes(changed)
        start = time.perf_counter()
        try:
            load_prompt_cache(self.path)
        except CacheFileError as error:
            message = str(error)
        else:
            pytest.fail(f"accepted: {note}")
        assert time.perf_counter() - start < 5
        assert "\n" not in message and len(message) < len(str(self.path)) + 250
        assert str(self.path) in message
        self.messages.add(message)
        self.cases += 1

    def signed(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """As `refused`, of a file with a right digest and a changed header (and data)."""
        header = copy.deepcopy(self.header)
        data = change(header)
        self.refused(signed(header, data if isinstance(data, bytes) else self.data), header)


@pytest.fixture
def fuzz(tmp_path: Path) -> Fuzz:
    return Fuzz(tmp_path)


def test_fuzz_truncation_and_flips(fuzz: Fuzz) -> None:
    good, size = fuzz.good, len(fuzz.good)
    header = size - len(fuzz.data)
    ends = {*range(0, 120, 7), header, size - 1, *(fuzz.random.randrange(size) for _ in range(60))}
    for end in ends:
        fuzz.refused(good[:end], f"first {end} bytes")
    fuzz.refused(good + b"\0", "one byte more")
    places = [*range(8), *(fuzz.random.randrange(header) for _ in range(200))]
    places += [fuzz.random.randrange(header, size) for _ in range(150)]
    for place in places:
        flipped = bytearray(good)
        flipped[place] ^= 1 << fuzz.random.randrange(8)
        fuzz.refused(bytes(flipped), f"bit of byte {place}")
    for _ in range(40):
        start, n = fuzz.random.randrange(size), fuzz.random.randrange(1, 200)
        junk = fuzz.random.randbytes(n)
        fuzz.refused(good[:start] + junk + good[start + n :], f"{n} bytes at {start}")
        fuzz.refused(good[:start] + junk + good[start:], f"{n} more bytes at {start}")
    assert fuzz.cases > 500


JUNK: list[Any] = [-1, 1 << 33, 1 << 63, 10**400, 1.5, "7", "", "x" * 5000, [], {}, [[]], True]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from leaves(child, (*path, key))
    else:
        yield path


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def test_fuzz_headers_that_lie(fuzz: Fuzz) -> None:
    layers = json.loads(fuzz.header["__metadata__"]["layers"])
    places = [path for path in leaves(layers) if path[-1] != "keep_fetched"]
    for path in places:
        for junk in fuzz.random.sample(JUNK, 4):
            changed = copy.deepcopy(layers)
            put(changed, path, junk)
            fuzz.signed(lambda h, c=changed: h["__metadata__"].update(layers=json.dumps(c)))
    names = [name for name in fuzz.header if name != "__metadata__"]
    for name in names:
        for path in leaves(fuzz.header[name], (name,)):
            junk = fuzz.random.choice(JUNK)
            fuzz.signed(lambda h, p=path, j=junk: put(h, p, j))
        fuzz.signed(lambda h, n=name: h.pop(n))
        fuzz.signed(lambda h, n=name: h.update({n + "x": h.pop(n)}))
        other = fuzz.random.choice([n for n in names if n != name])
        fuzz.signed(lambda h, a=name, b=other: h.update({a: h[b]}))
    assert fuzz.cases > 500


SHAPES: list[list[Any]] = [
    [1 << 62], [1 << 40, 0], [1 << 31, 1 << 31, 0], [-2, -2], [0], [2.0], ["2"], [True], [None],
    [1] * 5000, [[2]], [10**300], [],
]  # fmt: skip


def test_fuzz_absurd_shapes(fuzz: Fuzz) -> None:
    for name in ("0.k", "0.0.blocks", "0.0.lengths", "4.0", "11.1.positions", "11.0.marks"):
        for shape in SHAPES:
            fuzz.signed(lambda h, n=name, s=shape: h[n].update(shape=s))
            fuzz.signed(lambda h, n=name, s=shape: h[n].update(shape=s, data_offsets=[0, 0]))
        right = fuzz.header[name]["shape"]
        fuzz.signed(lambda h, n=name, s=right: h[n].update(shape=s[::-1] if len(s) > 1 else [1, 2]))
        fuzz.signed(lambda h, n=name, s=right: h[n].update(shape=[1, *s]))
        fuzz.signed(lambda h, n=name: h[n].update(dtype="F64"))
    sizes = {"F32": "I32", "U32": "F32", "I32": "U32"}
    for name, row in fuzz.header.items():
        if row.get("dtype") in sizes and not name.startswith("9."):  # an ArraysCache holds any
            fuzz.signed(lambda h, n=name, d=sizes[row["dtype"]]: h[n].update(dtype=d))


def test_fuzz_slots_of_ragged_heads(fuzz: Fuzz) -> None:
    """Lengths and positions that no layer has are refused, and what is not can be worked with."""
    kinds: dict[str, Any] = {"I32": np.int32, "U16": np.uint16, "U8": np.uint8}
    accepted = 0
    for _ in range(300):
        name = fuzz.random.choice([f"11.{i}.{x}" for i in (0, 1) for x in ("lengths", "positions")])
        begin, end = fuzz.header[name]["data_offsets"]
        values = np.frombuffer(fuzz.data[begin:end], kinds[fuzz.header[name]["dtype"]]).copy()
        limits = np.iinfo(values.dtype)
        value = fuzz.random.choice([limits.min, -1, 0, 1, 4, 32, 99, 268, 269, 300, limits.max])
        values[fuzz.random.randrange(len(values))] = np.clip(value, limits.min, limits.max)
        data = fuzz.data[:begin] + values.tobytes() + fuzz.data[end:]
        if data == fuzz.data:
            continue
        fuzz.path.write_bytes(signed(copy.deepcopy(fuzz.header), data))
        try:
            cache = load_prompt_cache(fuzz.path).caches[11]
        except CacheFileError:
            fuzz.cases += 1
            continue
        accepted += 1
        positions = cache.layer.body.describe().positions
        for head in positions:
            held = head[head >= 0]
            assert len(np.unique(held)) == len(held) and held.min() >= 4 and held.max() < 268
        ragged(cache)
        filled(cache, 40)
        cache.trim(60)
        mx.eval(filled(cache, 1).state)
    assert fuzz.cases > 150 and accepted


@pytest.mark.parametrize("name", ["12.order", "12.groups", "13.order", "14.groups"])
def test_fuzz_masks(fuzz: Fuzz, name: str) -> None:
    """Channels that are named twice or not at all, and groups that are not those of the tiers."""
    values = [-(1 << 31), -1, 0, 1, 2, 31, 32, (1 << 31) - 1]
    shape = fuzz.header[name]["shape"]
    for place in np.ndindex(*shape[:1], *[4] * (len(shape) - 1)):
        for value in values:
            changed = changed_values(fuzz, name, lambda x, p=place, v=value: x.__setitem__(p, v))
            if name != "14.groups" or value not in (0, 1):  # what an empty layer keeps is its own
                fuzz.refused(changed, (name, place, value))
    for key in ("shape", "dtype"):
        for junk in ([], [1], [*shape, 1], [0, *shape[1:]], "F32", "I64", "U8"):
            fuzz.signed(lambda h, k=key, j=junk: h[name].update({k: j}))
    assert fuzz.cases > 20


@pytest.mark.parametrize("name", ["16.basis", "17.costs", "18.basis"])
def test_fuzz_bases(fuzz: Fuzz, name: str) -> None:
    """Numbers that are none, and matrices that cannot be inverted or are of another layer."""
    for value in (0, 0x7C00, 0xFC00, 0x7E00):  # nothing, infinities, none

        def fill(x: Any, value: int = value) -> None:
            x.view(np.uint16)[1] = value

        fuzz.refused(changed_values(fuzz, name, fill), (name, value))
    shape = fuzz.header[name]["shape"]
    for junk in ([], [1], [*shape, 1], [1, *shape[1:]], [0, *shape[1:]], [shape[0], 16, 64]):
        fuzz.signed(lambda h, j=junk: h[name].update({"shape": j}))
    for junk in ("F32", "BF16", "U16", "I8"):
        fuzz.signed(lambda h, j=junk: h[name].update({"dtype": j}))
    fuzz.signed(lambda h: h.update({"more.basis": h.pop(name)}))


def test_slots_of_a_head_that_keeps_nothing_are_refused(fuzz: Fuzz) -> None:
    """The blocks and positions are as many as before, but a head has them that can have none."""

    def change(lengths: np.ndarray) -> None:
        lengths[:] = lengths[0] - TILE, TILE

    fuzz.refused(changed_values(fuzz, "13.0.lengths", change), "lengths")
    assert "contradict each other" in "".join(fuzz.messages)


def test_fuzz_foreign_tensors_and_classes(fuzz: Fuzz) -> None:
    end = len(fuzz.data)

    def foreign(header: dict[str, Any], name: str, extra: bytes = b"\0" * 4) -> bytes:
        header[name] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
        return fuzz.data + extra

    for name in (
        "foreign",
        "0",
        "0.mu",
        "2.0.blocks",
        "0.blocks",
        "0.0.positions",
        "2.key_scales",
        "3.k",
        "99.k",
        "",
        "model",
    ):
        fuzz.signed(lambda h, n=name: foreign(h, n))
        fuzz.signed(lambda h, n=name: foreign(h, n, b""))
    for name in ("BatchKVCache", "LRUPromptCache", "os.system", "__import__", "object", "", "dict"):
        for at in (0, 3, 4, 10):
            layers = json.loads(fuzz.header["__metadata__"]["layers"])
            layers[at]["class"] = name
            fuzz.signed(lambda h, c=layers: h["__metadata__"].update(layers=json.dumps(c)))
    deep = '{"class":"CacheList","caches":[' * 500 + "]}" * 500
    for text in (deep.join("[]"), "[" * 10**5, "{}", "null", "", "[1]", '[{"class":"CacheList"}]'):
        fuzz.signed(lambda h, t=text: h["__metadata__"].update(layers=t))
        fuzz.signed(lambda h, t=text: h["__metadata__"].update(metadata=t if t != "{}" else "[]"))


def test_fuzz_versions(fuzz: Fuzz) -> None:
    for version in ("1", "2", "4", "10", "0", "", "1.0", " 1", "x" * 9999, 1, None, [1], {"a": 1}):
        fuzz.signed(lambda h, v=version: h["__metadata__"].update(version=v))
    fuzz.signed(lambda h: h["__metadata__"].pop("version"))
    assert any("another version of the package" in message for message in fuzz.messages)


def test_fuzz_counts_and_settings_that_contradict_each_other(fuzz: Fuzz) -> None:
    for at in (0, 1, 2):
        for name in ("offset", "heads", "k_dim", "v_dim"):
            # A head_dim of 31 would be stored in the same 32 channels.
            for by in (-32, 1, 32, 64) if name.endswith("dim") else (-32, -1, 1, 32, 64):
                layers = json.loads(fuzz.header["__metadata__"]["layers"])
                layers[at][name] += by
                fuzz.signed(lambda h, c=layers: h["__metadata__"].update(layers=json.dumps(c)))
    start, end = fuzz.header["0.0.lengths"]["data_offsets"]
    for lengths in ((0, 0), (96, 64), (64, 64), (96, 97), (-1, 96), (1 << 30, 96)):
        changed = np.array(lengths, np.int32).tobytes()
        fuzz.signed(lambda h, c=changed: fuzz.data[:start] + c + fuzz.data[end:])
    for kv in ("leankv:k8v8", "leankv:k3v3", "leankv:k4v3,equalize=on", "leankv:sink_tokens=128"):
        layers = json.loads(fuzz.header["__metadata__"]["layers"])
        layers[0]["kv"] = kv
        fuzz.signed(lambda h, c=layers: h["__metadata__"].update(layers=json.dumps(c)))


def test_what_is_no_prompt_cache(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.zeros(3)})
    (tmp_path / "text").write_text("{}")
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_bytes(b"\xff" * 8 + b"{" * 100)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("other.safetensors", "text", "empty", "long", "folder", "pipe", "missing"):
        assert not container.has_magic(tmp_path / name)
        with pytest.raises(CacheFileError) as caught:
            load_prompt_cache(tmp_path / name)
        assert "\n" not in str(caught.value)


# A right digest says that nothing was damaged, not that nothing is wrong.


def changed_values(fuzz: Fuzz, name: str, change: Callable[[np.ndarray], Any]) -> bytes:
    """A file in which one tensor has other values, and the digest fits."""
    kinds: dict[str, Any] = {
        "F32": np.float32, "F16": np.float16, "U32": np.uint32, "I32": np.int32
    }  # fmt: skip
    begin, end = fuzz.header[name]["data_offsets"]
    values = np.frombuffer(fuzz.data[begin:end], kinds[fuzz.header[name]["dtype"]]).copy()
    change(values.reshape(fuzz.header[name]["shape"]))
    data = fuzz.data[:begin] + values.tobytes() + fuzz.data[end:]
    return signed(copy.deepcopy(fuzz.header), data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["0.k", "0.v", "0.mu_k", "1.mu_v", "1.key_scales", "11.k", "4.0", "5.0.1", "6.1"]
)
def test_values_that_are_no_numbers_are_refused(fuzz: Fuzz, name: str, value: float) -> None:
    """Silent nonsense: centers, divisors and exact rows go into every score."""

    def change(x: np.ndarray) -> None:
        x.reshape(-1)[fuzz.random.randrange(x.size)] = value

    fuzz.refused(changed_values(fuzz, name, change), (name, value))
    assert "no numbers" in "".join(fuzz.messages)


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00, 0xFFFF])
@pytest.mark.parametrize("name", ["0.0.blocks", "1.0.blocks", "11.0.blocks", "11.1.blocks"])
def test_scales_that_are_no_numbers_are_refused(fuzz: Fuzz, name: str, bits: int) -> None:
    """Silent nonsense: the fp16 scale of a key or value is NaN or infinite."""

    def change(blocks: np.ndarray) -> None:
        halves = blocks.view(np.uint16)
        halves[fuzz.random.randrange(len(blocks)), -fuzz.random.randrange(1, 64)] = bits

    fuzz.refused(changed_values(fuzz, name, change), (name, bits))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e30])
def test_divisors_that_are_never_written_are_refused(fuzz: Fuzz, value: float) -> None:
    """Silent nonsense: a channel that the equalizer divides by 0 or by next to nothing."""

    def change(scales: np.ndarray) -> None:
        scales[1, 3] = value

    fuzz.refused(changed_values(fuzz, "1.key_scales", change), value)


def test_dimensions_that_no_array_has_are_refused(fuzz: Fuzz) -> None:
    """OverflowError: a dimension of 2^31 beside a zero takes no bytes in the file."""
    end = len(fuzz.data)
    for name in ("0.k", "2.k", "4.0", "9.0.0", "0.0.blocks", "new"):
        for shape in ([1 << 31, 0], [0, 1 << 31], [0, (1 << 32) + 1, 2], [1 << 31, 0, 1 << 5]):
            row = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
            fuzz.signed(lambda h, n=name, r=row: h.update({n: r}))
            fuzz.signed(lambda h, n=name, r=row: h.update({n: {**r, "dtype": "BF16"}}))


def one_long_head(heads: int, blocks: int) -> bytes:
    """A layer of many heads, of which one has all the blocks and the others none."""
    words = 32 * (2 + 2 + 1)
    record = {"class": "CompressedKVCache", "kv": "leankv:k2v2,equalize=off,sink_tokens=0,"
              "policy=threshold,low=none", "keep_fetched": False, "offset": 32 * blocks,
              "heads": heads, "k_dim": 32, "v_dim": 32}  # fmt: skip
    lengths = np.zeros(heads, np.int32)
    lengths[0] = 32 * blocks
    tensors = {
        "0.k": ("F16", np.zeros((heads, 0, 32), np.float16)),
        "0.v": ("F16", np.zeros((heads, 0, 32), np.float16)),
        "0.mu_k": ("F32", np.zeros((heads, 32), np.float32)),
        "0.mu_v": ("F32", np.zeros((heads, 32), np.float32)),
        "0.0.lengths": ("I32", lengths),
        "0.0.blocks": ("U32", np.zeros((blocks, words), np.uint32)),
        "0.0.positions": ("U32", np.arange(32 * blocks, dtype=np.uint32)),
        "0.0.marks": ("U8", np.zeros(32 * blocks, np.uint8)),
    }
    texts = {"format": container.FORMAT, "digest": "", "version": str(container.VERSION)}
    header: dict[str, Any] = {
        "__metadata__": {**texts, "layers": json.dumps([record]), "metadata": "{}"}
    }
    data = b""
    for name, (dtype, array) in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    return signed(header, data)


def test_a_table_is_bounded_by_the_file(tmp_path: Path) -> None:
    """All memory from a small file: heads times the longest head, of which the file has little."""
    path = tmp_path / "cache"
    path.write_bytes(one_long_head(2, 40))
    (cache,) = load_prompt_cache(path).caches  # what the hostile one differs from by its size only
    assert cache.layer.body.slots == 40 * 32
    path.write_bytes(one_long_head(1 << 14, 14_000))
    assert path.stat().st_size < 15 << 20
    tracemalloc.start()
    with pytest.raises(CacheFileError, match="contradict each other"):
        load_prompt_cache(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size


def test_the_digest_comes_before_any_array(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds before allocation: what was changed by accident is never made an array of."""
    monkeypatch.setattr(container, "_array", None)
    fuzz.refused(fuzz.good[:-1] + bytes([fuzz.good[-1] ^ 1]), "last byte")
    assert "digest" in "".join(fuzz.messages)


def test_a_header_is_as_long_as_it_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="bytes of layers and metadata"):
        save_prompt_cache(tmp_path / "cache", one_of_each(), {"x": "y" * 5_000_000})
    assert not list(tmp_path.iterdir())


def test_fuzz_structured_with_a_right_digest(fuzz: Fuzz) -> None:
    """Any tensor with any other values is refused with one line, or makes a cache of numbers."""
    names = [name for name in fuzz.header if name != "__metadata__"]
    accepted = 0
    for _ in range(400):
        name = fuzz.random.choice(names)
        begin, end = fuzz.header[name]["data_offsets"]
        values = bytearray(fuzz.data[begin:end])
        for _ in range(fuzz.random.randrange(1, 4) if values else 0):
            at = fuzz.random.randrange(len(values))
            junk = fuzz.random.choice([b"\0", b"\xff", b"\x80", fuzz.random.randbytes(4)])
            values[at : at + len(junk)] = junk
        data = fuzz.data[:begin] + bytes(values[: end - begin]) + fuzz.data[end:]
        fuzz.path.write_bytes(signed(copy.deepcopy(fuzz.header), data))
        try:
            caches = load_prompt_cache(fuzz.path).caches
        except CacheFileError as error:
            fuzz.messages.add(str(error))
            continue
        accepted += 1
        layer = int(name.split(".")[0])
        if isinstance(caches[layer], CompressedKVCache) and not caches[layer].empty():
            view = caches[layer].view()
            present = True if view.present() is None else view.present()[..., None]
            for rows in caches[layer].layer.rows():
                assert mx.where(present, mx.isfinite(rows), True).all().item()
    assert 50 < accepted < 400
    assert all("\n" not in message for message in fuzz.messages)


# What was written is read, however little it is.


@pytest.mark.parametrize("at", range(19))
def test_a_cache_that_was_trimmed_to_nothing_comes_back(at: int, tmp_path: Path) -> None:
    """Refused by its own reader: a layer that has a shape and no tokens."""
    cache = one_of_each()[at]
    if not isinstance(cache, CompressedKVCache) and not cache.is_trimmable():
        pytest.skip("this class keeps no past to go back to")
    cache.trim(10**6)
    (again,) = reloaded([cache], tmp_path)
    assert content(again) == content(cache)
    if isinstance(cache, CompressedKVCache):
        assert again.offset == 0
        ours, theirs = (filled(x, 150, seed=4) for x in (cache, again))
        assert content(theirs) == content(ours)


def test_a_ragged_layer_whose_body_was_trimmed_away_comes_back(tmp_path: Path) -> None:
    cache = one_of_each()[11]
    assert cache.layer.body.ragged
    cache.trim(cache.offset - 5)  # the sink tokens, and one that no head has kept
    (again,) = reloaded([cache], tmp_path)
    assert content(again) == content(cache)


@pytest.mark.parametrize("groups", [(1, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("left", [139, 100, 77, 37, 36, 5, 4])
@pytest.mark.parametrize("replies", [False, True])
def test_a_masked_layer_is_cut_anywhere_and_comes_back(
    groups: tuple[int, ...], left: int, replies: bool, tmp_path: Path
) -> None:
    """Below the window of one that is narrowed its codes stay, with positions from then on, and the
    window is empty."""
    cache = filled(masked("leankv:k8v8,window=32,mask=some", groups), 140)
    if replies:
        narrowed(cache)
    cache.trim(140 - left)
    assert cache.offset == left
    (again,) = reloaded([cache], tmp_path)
    assert content(again) == content(cache)
    assert cache.is_trimmable() == again.is_trimmable() == (not replies)
    ours, theirs = (filled(x, 150, seed=4) for x in (cache, again))
    assert content(theirs) == content(ours) and ours.offset == left + 150
    assert theirs.layer.narrowed == replies  # also where the body went


def test_files_say_whether_a_layer_is_narrowed(fuzz: Fuzz) -> None:
    """By whether its prompt was in; what they say is what its tiers are."""
    layers = json.loads(fuzz.header["__metadata__"]["layers"])
    assert [record.get("narrowed") for record in layers[11:16]] == [None, True, True, None, False]
    for place in (12, 13, 15):
        says = layers[place].pop("narrowed")
        fuzz.signed(lambda h: h["__metadata__"].update(layers=json.dumps(layers)))
        for junk in (not says, None, 1, 0, "true", []):
            if place == 13 and junk is False:
                continue  # one of which a policy left no token of the second head
            layers[place]["narrowed"] = junk
            fuzz.signed(lambda h: h["__metadata__"].update(layers=json.dumps(layers)))
        layers[place]["narrowed"] = says
    layers[0]["narrowed"] = True  # it has no mask
    fuzz.signed(lambda h: h["__metadata__"].update(layers=json.dumps(layers)))
    assert fuzz.cases == 21
