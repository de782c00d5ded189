"""A prompt's beginning in the model's caches: opened from a file, or read and kept.

The beginning is read by itself in both cases, and a reloaded cache is bit-identical, so what
follows does not depend on where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK, Pace, Progress, prefill
from leankv_mlx.mlx_lm.repetition import settle_document
from leankv_mlx.mlx_lm.stored_prompts import computed_identity, shaped_caches
from leankv_mlx.serving.keys import Key, kv_name


@dataclass(frozen=True, slots=True)
class Opened:
    """Caches that hold a prefix; `cached` if they come from a file."""

    caches: list[Any]
    cached: bool


@dataclass(frozen=True)
class Opener:
    """Opens prefixes for one model with one setting.

    Attributes:
        config: what the model's caches are compressed with, as an attachment has it; None if they
            are not.
        store: where they are kept; None to keep nothing.
    """

    loaded: LoadedModel
    config: CompressionConfig | None
    store: DocumentCache | None

    def open(self, prefix: Sequence[int], name: str, progress: Progress) -> Opened:
        """Caches that hold `prefix`, and nothing else.

        Args:
            name: what to call the document.
        """
        if (found := self.find(prefix, name)) is not None:
            return Opened(found, True)
        caches = make_caches(self.loaded.model)
        prefill(self.loaded.model, prefix, caches, progress)
        self.keep(prefix, name, caches)
        return Opened(caches, False)

    def find(self, prefix: Sequence[int], name: str) -> list[Any] | None:
        """The caches of a prefix that was kept; None if it has to be read."""
        if self.store is None or not self.store.path(key := self._key(prefix)).exists():
            return None
        return self.store.load(key, name, shaped_caches(self.loaded.model))

    def keep(
        self,
        prefix: Sequence[int],
        name: str,
        caches: list[Any],
        pace: Pace | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """Call it when a prefix was read into its caches, before anything follows.

        Args:
            look: called at this pace while the prefix is judged; may raise to stop, and then
                nothing is kept.
        """
        settle(self.loaded.model, prefix, caches, pace, look)
        if self.store is not None:
            self.store.save(self._key(prefix), name, self.loaded.path.name, caches)

    def _key(self, prefix: Sequence[int]) -> Key:
        return Key(self._identity, kv_name(self.config), tuple(prefix), PREFILL_CHUNK)

    @cached_property
    def _identity(self) -> str:
        return computed_identity(self.loaded.model, self.loaded.path)


def settle(
    model: nn.Module,
    prefix: Sequence[int],
    caches: list[Any],
    pace: Pace | None = None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """The document is read, and no question is known yet: whatever is done to its caches as a
    whole is done here, so that a file and the caches in memory stay the same."""
    settle_document(model, caches, prefix, pace=pace, look=look)
    mx.eval([cache.state for cache in caches])
    mx.clear_cache()  # buffers of the prefill
