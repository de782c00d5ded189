"""One update of all caches of a model, in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from leankv_mlx.cache.compressed import CompressedKVCache


@contextmanager
def one_update(caches: Iterable[Any]) -> Iterator[None]:
    """Count the updates inside as parts of one. What caches hold then depends on where updates end
    and not on where they were cut, and whoever reads a prompt can look up in the middle of one.

    Until it ends, the rows of the update are exact rows of all layers, not of one at a time.

    Args:
        caches: a cache list; entries that are not ours are left alone.
    """
    ours = list(_ours(caches))
    for cache in ours:
        cache.begin_parts()
    try:
        yield
    finally:  # one that is left in the middle ends there
        for cache in ours:
            cache.end_parts()


def _ours(caches: Iterable[Any]) -> Iterator[CompressedKVCache]:
    for cache in caches:
        if isinstance(cache, CompressedKVCache):
            yield cache
        else:
            yield from _ours(getattr(cache, "caches", ()))  # mlx-lm's CacheList
