"""The folder of entries: what is found by the beginning of a prompt, and by whom."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leankv_mlx import __version__
from leankv_mlx.cache import CompressedKVCache, container
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.mlx_lm.stored_prompts import StoredPrompts
from leankv_mlx.serving.keys import Key, Reading, is_ours, name_of, tokens_in
from tests.cache.prompt_files import content, filled

KV = "leankv:k4v4,window=32"
READING = Reading("model", KV, 512)
TOKENS = [*range(300)]


def key(length: int, reading: Reading = READING, tokens: list[int] = TOKENS) -> Key:
    return Key(reading.model, reading.kv, tuple(tokens[:length]), reading.chunk)


def caches(length: int) -> list[Any]:
    return [filled(CompressedKVCache(KV), length), filled(CompressedKVCache(KV), length, seed=3)]


def fresh() -> list[Any]:
    return [CompressedKVCache(KV), CompressedKVCache(KV)]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def entries(tmp_path: Path, notes: list[str]) -> StoredPrompts:
    return StoredPrompts(notes.append, tmp_path / "store", 10**9)


def test_digests_are_those_of_earlier_releases() -> None:
    """They name what is stored already."""
    tokens = [5, 0, 151_000, -1 - 2**59, 7]
    for n, digest in READING.digests(tokens, [3, 0, 5, 1, 2]):
        parts = [__version__, container.VERSION, "model", KV, 512, tuple(tokens[:n])]
        expected = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
        assert digest == expected == key(n, tokens=tokens).digest
    ((_, of_array),) = READING.digests(np.array(tokens), [5])
    assert of_array == key(5, tokens=tokens).digest
    assert [n for n, _ in READING.digests(tokens, {4, 2})] == [2, 4]


def test_names() -> None:
    name = name_of(key(7).digest, 7)
    assert (tokens_in(name), is_ours(name)) == (7, True)
    assert (tokens_in(name[:32]), is_ours(name[:32])) == (None, True)
    for other in ("model", name[:31], f"{name}x", f"{name[:32]}-", f"{name[:32]}-07", f"x{name}"):
        assert (tokens_in(other), is_ours(other)) == (None, False)


def test_the_longest_prefix_that_is_there_is_found(entries: StoredPrompts) -> None:
    assert entries.longest(READING, TOKENS) == 0
    for length in (64, 100, 200):
        assert entries.save(key(length), "x", "m", caches(length))
    assert entries.longest(READING, TOKENS) == 200
    assert entries.longest(READING, TOKENS[:200]) == 200
    assert entries.longest(READING, TOKENS[:199]) == 100
    assert entries.longest(READING, [*TOKENS[:150], 9, *TOKENS[151:]]) == 100
    assert entries.longest(READING, [9, *TOKENS[1:]]) == 0
    assert entries.longest(READING, TOKENS[:199], above=100) == 0
    for field in ({"model": "other"}, {"kv": "leankv:k3v3"}, {"chunk": 256}):
        assert entries.longest(replace(READING, **field), TOKENS) == 0
    (entries.place / "model-00001-of-00002.safetensors").write_bytes(b"the user's")
    assert entries.longest(READING, TOKENS) == 200
    entries.limit = 0
    assert entries.longest(READING, TOKENS) == 0


def test_an_entry_of_an_earlier_release_opens_and_is_replaced(entries: StoredPrompts) -> None:
    assert entries.save(key(100), "report", "m", caches(100))
    (file,) = entries.place.glob("*.safetensors")
    earlier = file.rename(entries.place / f"{key(100).digest}.safetensors")
    found = entries.load(key(100), "report", fresh())
    assert content(found) == content(caches(100))
    assert entries.save(key(100), "report", "m", caches(100))
    assert list(entries.place.glob("*.safetensors")) == [earlier]
    assert [entry.key for entry in entries.entries()] == [key(100).digest]


def test_documents_open_what_was_kept_as_a_document(entries: StoredPrompts) -> None:
    documents = DocumentCache(entries._note, entries.place, 10**9)
    assert entries.save(key(100), "a prefix", "m", caches(100), document=False)
    assert entries.load(key(100), "a prefix", fresh()) is not None
    assert documents.load(key(100), "report", fresh()) is None
    (entry,) = entries.entries()  # it is not damaged, and stays
    assert (entry.document, entry.tokens, entry.model) == ("", 100, "m")
    assert documents.save(key(100), "report", "m", caches(100))
    assert documents.load(key(100), "report", fresh()) is not None
    assert entries.load(key(100), "a prefix", fresh()) is not None
    assert [entry.document for entry in entries.entries()] == ["report"]
