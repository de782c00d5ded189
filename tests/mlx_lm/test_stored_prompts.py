"""One folder for documents and for the prompts of a server, with a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from leankv_mlx.cli.app import run
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.mlx_lm import LoadedModel, attach, load, make_caches
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.mlx_lm.stored_prompts import disk_store
from leankv_mlx.serving import PromptStore
from tests.documents.shelf import TOKENS

KV = "leankv:window=32"
CONFIG = CompressionConfig.parse(KV)


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    found = load()
    with attach(found.model, CONFIG):
        yield found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return tmp_path / "cache" / "documents"


def served(loaded: LoadedModel, **options: Any) -> PromptStore:
    notes: list[str] = []
    disk = disk_store(loaded.model, loaded.path, CONFIG, note=notes.append, **options)
    assert notes == []
    return PromptStore(disk=disk)


def test_a_prompt_survives_a_restart_and_is_listed(
    loaded: LoadedModel, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = make_caches(loaded.model)
    prefill(loaded.model, TOKENS, caches)
    first = served(loaded)
    first.insert_cache("key", TOKENS, caches)
    kept, rest = first.fetch_nearest_cache("key", [*TOKENS[:150], 7, 8])
    first.disk.close()  # type: ignore[union-attr]
    found, same = served(loaded).fetch_nearest_cache("key", [*TOKENS[:150], 7, 8])
    assert rest == same == [7, 8]
    logits = [loaded.model(mx.array([rest]), cache=x) for x in (kept, found)]
    assert mx.array_equal(*logits)
    assert [file.name.partition("-")[2] for file in place.glob("*.safetensors")] == [
        "150.safetensors"
    ]
    assert run(["cache", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert (entry["document"], entry["tokens"], entry["kv"]) == ("", 150, CONFIG.portable.spec())
    assert entry["model"] == loaded.path.name
    assert run(["cache", "list"]) == 0
    assert "prompt of 150 tokens" in capsys.readouterr().out
    assert run(["cache", "rm", "--all"]) == 0
    assert not list(place.glob("*.safetensors"))


def test_a_document_that_was_read_serves_a_prompt_that_begins_with_it(
    loaded: LoadedModel,
) -> None:
    opener = Opener(loaded, CONFIG, DocumentCache())
    opened = opener.open(TOKENS, "report.txt", lambda done, total: None)
    store = served(loaded)
    assert store.longest("key", [*TOKENS, 9]) == len(TOKENS)
    caches, rest = store.fetch_nearest_cache("key", [*TOKENS, 9])
    assert rest == [9]
    logits = [loaded.model(mx.array([[9]]), cache=x) for x in (opened.caches, caches)]
    assert mx.array_equal(*logits)
    assert served(loaded, chunk=2048).longest("key", [*TOKENS, 9]) == 0  # it was read otherwise
    assert served(loaded, limit=0).longest("key", [*TOKENS, 9]) == 0
