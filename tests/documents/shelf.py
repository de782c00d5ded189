"""A document cache in a folder of its own, and what tests put into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.mlx_lm import LoadedModel, make_caches
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK, prefill
from leankv_mlx.serving.keys import Key, name_of

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


KEY = Key("model", "leankv:k4v4,window=32", tuple(TOKENS), PREFILL_CHUNK)
NAME = name_of(KEY.digest, len(TOKENS))


def read(loaded: LoadedModel, tokens: list[int] = TOKENS) -> list[Any]:
    caches = make_caches(loaded.model)
    prefill(loaded.model, tokens, caches, lambda done, total: None)
    return caches


def reopened(shelf: Shelf, loaded: LoadedModel, key: Key = KEY) -> list[Any] | None:
    return shelf.cache.load(key, "report.txt", make_caches(loaded.model))
