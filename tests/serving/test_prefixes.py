"""Prefixes on disk: what two prompts began with is there after a restart, whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

from leankv_mlx.cache import CompressedKVCache, Sequence, entries
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm.stored_prompts import StoredPrompts
from leankv_mlx.serving import PromptStore
from leankv_mlx.serving.keys import Reading
from leankv_mlx.serving.prefixes import WORTH, Prefixes
from tests.cache.prompt_files import content, filled, ragged, rows

ROOT = Path(__file__).parents[2]
KV = "leankv:k4v4,window=32"
TOKENS = [*range(400)]


def fresh() -> list[Any]:
    of = Sequence(*(getattr(CompressionConfig.parse(KV), x) for x in ("policy", "scorer")))
    return [CompressedKVCache(KV, sequence=of) for _ in range(2)]


def read(tokens: int, made: list[Any] | None = None) -> list[Any]:
    return [filled(cache, tokens, seed=i) for i, cache in enumerate(made or fresh())]


class Server:
    """A store over a folder, as a server has it from its start to its end."""

    def __init__(self, place: Path, limit: int = 10**9, make: Any = fresh, **of: Any) -> None:
        self.notes: list[str] = []
        folder = StoredPrompts(self.notes.append, place, limit)
        reading = Reading(of.get("model", "m"), of.get("kv", KV), 512)
        self.disk = Prefixes(folder, reading, "demo", make)
        self.store = PromptStore(disk=self.disk)

    def fetch(self, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """What is found of a prompt, with the tokens that it serves."""
        caches, rest = self.store.fetch_nearest_cache("m", tokens)
        self.disk.close()
        return caches, len(tokens) - len(rest)

    @property
    def stored(self) -> list[int]:
        return sorted(entry.tokens for entry in self.disk.entries.entries())


def test_what_two_prompts_began_with_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Server(tmp_path)
    first.store.insert_cache("m", TOKENS[:300], read(300))
    assert first.stored == []
    caches, found = first.fetch([*TOKENS[:200], 999, 998])
    assert (found, first.stored, first.store.hits) == (200, [200], 1)
    expected = content(caches)

    second = Server(tmp_path)
    assert second.store.longest("m", TOKENS) == 200 and len(second.store) == 0
    caches, found = second.fetch([*TOKENS[:200], 7])
    assert found == 200 and content(caches) == expected
    assert (len(second.store), second.store.reused) == (1, 200)  # the next time it is in memory
    os.unlink(next(tmp_path.glob("*.safetensors")))
    assert second.fetch([*TOKENS[:200], 5])[1] == 200
    assert second.store.longest("m", TOKENS[:200]) == 199  # a token remains to be read
    assert first.notes == second.notes == []


def test_a_cache_from_disk_is_the_callers_own(tmp_path: Path) -> None:
    first = Server(tmp_path)
    first.store.insert_cache("m", TOKENS[:300], read(300))
    first.fetch([*TOKENS[:300], 1])
    server = Server(tmp_path)
    caches, _ = server.fetch([*TOKENS[:300], 1])
    assert caches is not None and caches[0].sequence is caches[1].sequence
    before = content(server.fetch([*TOKENS[:300], 2])[0])
    read(50, caches)
    assert content(server.fetch([*TOKENS[:300], 3])[0]) == before


def test_what_is_stored_serves_what_is_little_longer(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.store.insert_cache("m", TOKENS[:380], read(380))
    for n, stored in (
        (WORTH - 1, []), (100, [100]), (120, [100]), (100 + WORTH, [100, 164]),
        (210, [100, 164]), (380, [100, 164, 380]), (170, [100, 164, 380]),
    ):  # fmt: skip
        assert server.fetch([*TOKENS[:n], 999])[1] == n
        assert server.stored == stored
    other = Server(tmp_path)
    other.store.insert_cache("m", TOKENS[:330], read(330))
    assert other.store.longest("m", TOKENS) == 330  # 50 tokens more are as soon read
    assert other.fetch([*TOKENS[:330], 1])[1] == 330


def test_other_models_settings_and_lists_find_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.store.insert_cache("m", TOKENS[:300], read(300))
    server.fetch(TOKENS)
    assert server.stored == [300]
    for other in ({"model": "other"}, {"kv": "leankv:k3v3,window=32"}):
        assert Server(tmp_path, **other).fetch(TOKENS) == (None, 0)
    # A server with a drafting model has its caches in the same list.
    drafting = Server(tmp_path, model="other")
    drafting.store.insert_cache("m", TOKENS[:300], [*read(300), *read(300)])
    assert drafting.fetch(TOKENS)[1] == 300
    assert drafting.stored == [300] and drafting.notes == []


def test_what_dropped_tokens_is_stored_whole_and_serves_whole(tmp_path: Path) -> None:
    kv = "leankv:policy=threshold,window=32"

    def make() -> list[Any]:
        return [CompressedKVCache(kv)]

    server = Server(tmp_path, make=make, kv=kv)
    caches = [ragged(cache) for cache in read(300, make())]
    for cache in caches:
        cache.layer.placed = cache.offset
    server.store.insert_cache("m", TOKENS[:300], caches)
    assert server.fetch([*TOKENS[:200], 9]) == (None, 0)
    assert server.fetch(TOKENS)[1] == 300
    again = Server(tmp_path, make=make, kv=kv)
    assert again.fetch([*TOKENS[:200], 9]) == (None, 0)
    found, n = again.fetch(TOKENS)
    assert n == 300 and content(found) == content(caches)
    assert again.fetch(TOKENS[:299]) == (None, 0)


def test_caches_of_mlx_lm_beside_ours(tmp_path: Path) -> None:
    def make() -> list[Any]:
        inner = CompressedKVCache(KV)
        return [stock.CacheList(inner, stock.KVCache()), stock.ArraysCache(1)]

    caches = make()
    for child in caches[0].caches:
        filled(child, 150)
    caches[1][0] = mx.ones((1, 4))
    server = Server(tmp_path, make=make)
    server.store.insert_cache("m", TOKENS[:150], caches)
    assert server.fetch(TOKENS[:100]) == (None, 0)  # a recurrent state cannot be cut
    assert server.fetch(TOKENS)[1] == 150
    again = Server(tmp_path, make=make)
    found, n = again.fetch(TOKENS)
    assert n == 150 and again.notes == []
    assert content([*entries(found)]) == content([*entries(caches)])


def test_it_is_written_while_its_caches_go_on(tmp_path: Path) -> None:
    """The file holds the prefix, whatever comes to its pools while it is written, evaluated or
    not."""
    server, gone_on = Server(tmp_path), threading.Event()
    files = server.disk.entries._files

    def save(*args: Any) -> None:
        assert gone_on.wait(30)
        files.save(*args)

    server.disk.entries._files = files._replace(save=save)
    expected = content(read(300))
    server.store.insert_cache("m", TOKENS[:300], read(300))
    caches, rest = server.store.fetch_nearest_cache("m", [*TOKENS[:300], 1])
    assert caches is not None and rest == [1]
    read(100, caches)
    for cache in caches:
        cache.trim(150)
        for _ in range(20):  # a step that is on its way
            cache.update_and_fetch(rows(5, 1), rows(5, 2))
    gone_on.set()
    server.disk.close()
    assert content(Server(tmp_path).fetch([*TOKENS[:300], 1])[0]) == expected
    assert server.notes == []


def test_one_at_a_time_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path)
    server.store.insert_cache("m", TOKENS[:300], read(300))
    server.store.insert_cache("m", [7, *TOKENS[:300]], read(301))
    save = server.disk.entries._files.save

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        save(*args)

    monkeypatch.setattr(
        server.disk.entries, "_files", server.disk.entries._files._replace(save=slow)
    )
    start = time.monotonic()
    for _ in range(3):
        server.store.fetch_nearest_cache("m", TOKENS)
        server.store.fetch_nearest_cache("m", [7, *TOKENS])
    assert time.monotonic() - start < 0.5
    server.disk.close()
    assert server.stored == [300]
    server.fetch([7, *TOKENS])
    assert server.stored == [300, 301]


def test_a_damaged_entry_is_removed_and_its_tokens_are_read_again(tmp_path: Path) -> None:
    first = Server(tmp_path)
    first.store.insert_cache("m", TOKENS[:300], read(300))
    first.fetch([*TOKENS[:100], 999])
    first.fetch(TOKENS)
    assert first.stored == [100, 300]
    (file,) = tmp_path.glob("*-300.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    server = Server(tmp_path)
    assert server.fetch(TOKENS)[1] == 100  # the longest that is whole
    assert server.stored == [100]
    assert "the kept copy of a prefix of 300 tokens is not used" in server.notes[0]


def test_the_limit_holds_and_what_is_used_stays(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.store.insert_cache("m", TOKENS[:300], read(300))
    server.fetch(TOKENS)
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    server.disk.entries.limit = int(2.5 * size)
    for other in (1001, 1002):
        tokens = [other, *TOKENS[1:300]]
        server.store.insert_cache("m", tokens, read(300))
        for file in tmp_path.glob("*.safetensors"):
            os.utime(file, (time.time() - 100,) * 2)
        server.fetch(TOKENS)  # from memory, and its entry is in use
        server.fetch([*tokens, 1])
    kept = Server(tmp_path)
    assert kept.stored == [300, 300]
    assert kept.fetch(TOKENS)[1] == 300 == kept.fetch([1002, *TOKENS[1:]])[1]
    assert kept.fetch([1001, *TOKENS[1:]])[1] == 0
    assert Server(tmp_path, limit=0).fetch(TOKENS) == (None, 0)


WRITER = """
import random, sys
from pathlib import Path
from tests.serving.test_prefixes import Server, read

server, rng = Server(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
caches = read(300)
print("ready", flush=True)
while True:
    tokens = [rng.randrange(20), *range(1, 300)]
    server.store.insert_cache("m", tokens, read(300, None))
    server.fetch([*tokens, 1])
    for file in sorted(Path(sys.argv[1]).glob("*.safetensors"))[1:]:  # one is left to be found
        if rng.random() < 0.2:
            file.unlink(missing_ok=True)
"""


@contextmanager
def writer(place: Path, seed: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(place), str(seed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_server_loses_nothing_else(tmp_path: Path, kills: int) -> None:
    """Two servers share the folder, and one is killed at any moment."""
    rng = random.Random(kills)
    expected = content(read(300))
    with writer(tmp_path, 0):
        for kill in range(1, kills + 1):
            with writer(tmp_path, kill) as killed:
                time.sleep(rng.uniform(0, 0.4))
                killed.kill()
    server = Server(tmp_path)
    found = server.stored
    server.store.insert_cache("m", [99, *TOKENS[:299]], read(300))
    server.fetch([99, *TOKENS])
    assert not list(tmp_path.glob(".*.tmp"))
    assert server.stored == [*found, 300] and found
    opened = [Server(tmp_path).fetch([i, *TOKENS[1:]])[0] for i in range(20)]
    assert sum(caches is not None for caches in opened) == len(found)
    assert all(content(caches) == expected for caches in opened if caches is not None)
    assert server.notes == []
