"""The folder of stored caches, with what reads and writes those of mlx-lm's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.config import CompressionConfig
from leankv_mlx.folders import folder
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.cache_files import load_prompt_cache, save_prompt_cache
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.mlx_lm.precision import weights_dtype
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK
from leankv_mlx.serving.entries import Entries, Files, Note
from leankv_mlx.serving.keys import Reading, kv_name
from leankv_mlx.serving.prefixes import Prefixes


class StoredPrompts(Entries):
    """What was read before: documents, and prefixes of a server's prompts.

    Args:
        note: see `Entries`.
        place: the folder; by default the user's.
        limit: bytes of all entries; by default LEANKV_CACHE_LIMIT says.
    """

    def __init__(
        self, note: Note = lambda line: None, place: Path | None = None, limit: int | None = None
    ) -> None:
        place = folder("cache") / "documents" if place is None else place
        super().__init__(Files(save_prompt_cache, load_prompt_cache), place, note, limit)


def model_identity(path: Path) -> str:
    """What tells a model and its weights from others, cheaply: weights that are edited in place
    get another time, and those that were trained on differ where `fingerprint` looks."""
    times = [file.stat().st_mtime_ns for file in sorted(path.glob("*.safetensors"))]
    return f"{fingerprint(path)} {times}"


def computed_identity(model: nn.Module, path: Path) -> str:
    """The same for a model as it is loaded, with what it computes in."""
    exact = weights_dtype(model)
    precision = f" in float32, exact rows {exact}" if exact else ""
    return f"{model_identity(path)}{precision}"


def shaped_caches(model: nn.Module) -> list[Any]:
    """Caches as the model makes them now, which know their shapes and hold nothing of use."""
    caches = make_caches(model)
    model(mx.array([[1]]), cache=caches)  # never computed
    return caches


def disk_store(
    model: nn.Module,
    path: Path,
    config: CompressionConfig | None,
    place: Path | None = None,
    limit: int | None = None,
    note: Note = lambda line: None,
    chunk: int = PREFILL_CHUNK,
) -> Prefixes:
    """Where the prefixes of a server's prompts survive a restart.

    Args:
        model: loaded without an adapter, and attached to as it will be.
        path: its folder.
        config: what its caches are compressed with, None if they are not.
        place, limit, note: see `StoredPrompts`.
        chunk: tokens of a prompt that are read at a time.

    Raises:
        UsageError: no limit is given, and LEANKV_CACHE_LIMIT is no size.
    """
    reading = Reading(computed_identity(model, path), kv_name(config), chunk)
    entries = StoredPrompts(note, place, limit)
    return Prefixes(entries, reading, path.name, lambda: shaped_caches(model))
