"""Prompt cache files: a list of caches, exactly as they are, in a file of `container`.

Compressed layers are written by `layer_record`, other caches of a model by their state; which
classes those are, and what a valid state is, the caller says: a name in a file is never looked up
anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from leankv_mlx.cache import container, layer_record
from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.container import DamagedError
from leankv_mlx.cache.layer_record import LAYERS, Tensors
from leankv_mlx.cache.lists import unite
from leankv_mlx.config import BackendName, CompressionConfig
from leankv_mlx.errors import CacheFileError, ConfigError, UnsupportedError

COMPRESSED = CompressedKVCache.__name__
_MAX_DEPTH = 8


@dataclass(frozen=True)
class OtherClass:
    """A cache class that is not ours.

    Attributes:
        cls: the class itself; it has `state` and `from_state`.
        check: raises ValueError if a state (tuples as lists) cannot be a state of the class.
        children: its state is nothing but the caches that it holds, as `caches`.
    """

    cls: Any
    check: Callable[[list[Any]], None] = lambda state: None
    children: bool = False


OtherClasses = Mapping[str, OtherClass]


@dataclass(frozen=True)
class PromptCache:
    """The content of a file.

    Attributes:
        caches: one per entry of the model's cache list.
        metadata: what was saved beside them.
    """

    caches: list[Any]
    metadata: dict[str, str]

    @property
    def configs(self) -> list[CompressionConfig]:
        """Settings of the compressed layers, each once, without the backend."""
        found = (c.config.portable for c in self.caches if isinstance(c, CompressedKVCache))
        return list(dict.fromkeys(found))


def save(
    path: str | Path,
    caches: Sequence[Any],
    metadata: Mapping[str, str] | None = None,
    others: OtherClasses | None = None,
) -> None:
    """Write caches to a file; an older file stays as it is until the new one is complete.

    Raises:
        UnsupportedError: a cache is of a class that is not in `others`, or holds more than arrays,
            numbers and texts.
        CacheFileError: the file cannot be written.
    """
    tensors: Tensors = {}
    layers = [_record(c, str(i), tensors, others or {}) for i, c in enumerate(caches)]
    texts = {"layers": json.dumps(layers), "metadata": json.dumps(dict(metadata or {}))}
    container.write(path, tensors, texts)


def load(
    path: str | Path, others: OtherClasses | None = None, backend: BackendName = "auto"
) -> PromptCache:
    """Read a file that `save` made.

    Args:
        others: the classes besides ours that it may hold.
        backend: what runs the kernels of the compressed layers; it is no part of the file.

    Raises:
        CacheFileError: it cannot be read, or is not exactly what `save` wrote.
        BackendUnavailableError: the backend cannot run here.
    """
    try:
        tensors, texts = container.read(path)
        metadata = _object(texts, "metadata", dict)
        if not all(isinstance(text, str) for text in metadata.values()):
            raise DamagedError("its metadata is damaged")
        equalized = texts["version"] not in container.BEFORE_EQUALIZE
        reader = _Reader(tensors, others or {}, backend, equalized)
        records = enumerate(_object(texts, "layers", list))
        caches = [reader.cache(record, str(i)) for i, record in records]
        if tensors:
            raise DamagedError(f"it holds {len(tensors)} tensors that belong to no layer")
    except (DamagedError, ConfigError) as error:
        raise CacheFileError(
            f"{path} cannot be used: {str(error).rstrip('.')}; "
            "make it anew with mlx_lm.cache_prompt --kv leankv."
        ) from error
    except OSError as error:
        raise CacheFileError(f"cannot read {path}: {error.strerror or error}.") from error
    unite(caches)
    return PromptCache(caches, metadata)


def _object(texts: dict[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(texts.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its {name} are damaged") from error
    if not isinstance(value, kind):
        raise DamagedError(f"its {name} are damaged")
    return value


# Writing.


def _record(cache: Any, name: str, tensors: Tensors, others: OtherClasses) -> dict[str, Any]:
    """What the header says about a cache; its arrays go to `tensors`."""
    if isinstance(cache, CompressedKVCache):
        return {"class": COMPRESSED, **layer_record.written(cache, name, tensors)}
    kind = type(cache).__name__
    other = others.get(kind)
    if other is None or other.cls is not type(cache):
        raise UnsupportedError(f"a prompt cache file cannot hold a {kind}.")
    if other.children:
        children = enumerate(cache.caches)
        records = [_record(child, f"{name}.{i}", tensors, others) for i, child in children]
        return {"class": kind, "caches": records}
    return {"class": kind, "state": _tree(cache.state, name, tensors)}


def _tree(value: Any, name: str, tensors: Tensors) -> Any:
    if isinstance(value, mx.array):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        return [_tree(child, f"{name}.{i}", tensors) for i, child in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedError(f"a prompt cache file cannot hold a {type(value).__name__}.")


# Reading.


class _Reader:
    """Builds caches. Each takes its tensors out of `tensors`: what is left belongs to none."""

    def __init__(
        self, tensors: Tensors, others: OtherClasses, backend: BackendName, equalized: bool
    ) -> None:
        self.tensors = tensors
        self._equalized = equalized
        self._others = others
        self._backend = backend

    def cache(self, record: Any, name: str) -> Any:
        """The cache of a record; `name` is its place in the list, and in that of its parent."""
        if not isinstance(record, dict) or not isinstance(kind := record.get("class"), str):
            raise DamagedError(LAYERS)
        if kind == COMPRESSED:
            settings = {key: value for key, value in record.items() if key != "class"}
            return layer_record.read(settings, name, self.tensors, self._backend, self._equalized)
        other = self._others.get(kind)
        if other is None:
            raise DamagedError(f"it holds a layer of the unknown kind {kind[:40]!r}")
        content = record.get("caches" if other.children else "state")
        if len(record) != 2 or not isinstance(content, list) or name.count(".") > _MAX_DEPTH:
            raise DamagedError(LAYERS)
        if other.children:
            if not content:
                raise DamagedError(LAYERS)
            caches = (self.cache(child, f"{name}.{i}") for i, child in enumerate(content))
            return other.cls(*caches)
        state = [self._tree(value, 0) for value in content]
        try:
            other.check(state)
        except ValueError as error:
            raise DamagedError(f"its {kind} is not valid ({error})") from error
        return other.cls.from_state(state)

    def _tree(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise DamagedError(LAYERS)
        if isinstance(value, dict):
            name = value.get("tensor")
            if len(value) != 1 or not isinstance(name, str):
                raise DamagedError(LAYERS)
            return self._take(name)
        if isinstance(value, list):
            return [self._tree(child, depth + 1) for child in value]
        return value

    def _take(self, name: str) -> mx.array:
        if name not in self.tensors:
            raise DamagedError(f"it lacks the tensor {name[:40]!r}")
        return self.tensors.pop(name)
