"""Prompt cache files: a list of caches, exactly as they are, in a file of `container`.

Of a compressed layer the file holds the packed blocks in use, head by head and in order, so it
needs no block ids. Other caches of a model are stored by their state; which classes those are, and
what a valid state is, the caller says: a name in a file is never looked up anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.cache import container
from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.container import DamagedError
from leankv_mlx.codec.format import TILE, Format, padded
from leankv_mlx.config import BackendName, CompressionConfig
from leankv_mlx.errors import CacheFileError, ConfigError, UnsupportedError

COMPRESSED = CompressedKVCache.__name__
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_NUMBERS = {"offset": 1 << 31, "heads": 1 << 14, "k_dim": 1 << 14, "v_dim": 1 << 14}
_MAX_DEPTH = 8
_MAX_SPEC = 1000
_LAYERS = "its layers are damaged"
_COUNTS = "its numbers of tokens contradict each other"

Tensors = dict[str, mx.array]


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
        found = (_portable(c.config) for c in self.caches if isinstance(c, CompressedKVCache))
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
        reader = _Reader(tensors, others or {}, backend)
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
    return PromptCache(caches, metadata)


def _portable(config: CompressionConfig) -> CompressionConfig:
    return replace(config, backend="auto")


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
        return _compressed_record(cache, name, tensors)
    kind = type(cache).__name__
    other = others.get(kind)
    if other is None or other.cls is not type(cache):
        raise UnsupportedError(f"a prompt cache file cannot hold a {kind}.")
    if other.children:
        children = enumerate(cache.caches)
        records = [_record(child, f"{name}.{i}", tensors, others) for i, child in children]
        return {"class": kind, "caches": records}
    return {"class": kind, "state": _tree(cache.state, name, tensors)}


def _compressed_record(cache: CompressedKVCache, name: str, tensors: Tensors) -> dict[str, Any]:
    _, keep_fetched, *rest = cache.state
    spec = _portable(cache.config).spec()
    record: dict[str, Any] = {"class": COMPRESSED, "kv": spec, "keep_fetched": keep_fetched}
    if not rest:
        return record
    offset, heads, k_dim, v_dim, k, v, *body = rest
    record |= {"offset": offset, "heads": heads, "k_dim": k_dim, "v_dim": v_dim}
    tensors |= {f"{name}.k": k, f"{name}.v": v}
    if body:
        mu_k, mu_v, pool, ids, lengths, *scales = body
        table, blocks = np.array(ids), -(-np.array(lengths) // TILE)
        used = table[np.arange(table.shape[1]) < blocks[:, None]]
        tensors |= {
            f"{name}.mu_k": mu_k,
            f"{name}.mu_v": mu_v,
            f"{name}.lengths": lengths,
            f"{name}.blocks": pool[mx.array(used)],
        }
        tensors |= {f"{name}.key_scales": x for x in scales}
    return record


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

    def __init__(self, tensors: Tensors, others: OtherClasses, backend: BackendName) -> None:
        self.tensors = tensors
        self._others = others
        self._backend = backend

    def cache(self, record: Any, name: str) -> Any:
        """The cache of a record; `name` is its place in the list, and in that of its parent."""
        if not isinstance(record, dict) or not isinstance(kind := record.get("class"), str):
            raise DamagedError(_LAYERS)
        if kind == COMPRESSED:
            return self._compressed(record, name)
        other = self._others.get(kind)
        if other is None:
            raise DamagedError(f"it holds a layer of the unknown kind {kind[:40]!r}")
        content = record.get("caches" if other.children else "state")
        if len(record) != 2 or not isinstance(content, list) or name.count(".") > _MAX_DEPTH:
            raise DamagedError(_LAYERS)
        if other.children:
            if not content:
                raise DamagedError(_LAYERS)
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
            raise DamagedError(_LAYERS)
        if isinstance(value, dict):
            name = value.get("tensor")
            if len(value) != 1 or not isinstance(name, str):
                raise DamagedError(_LAYERS)
            return self._take(name)
        if isinstance(value, list):
            return [self._tree(child, depth + 1) for child in value]
        return value

    def _take(self, name: str) -> mx.array:
        if name not in self.tensors:
            raise DamagedError(f"it lacks the tensor {name[:40]!r}")
        return self.tensors.pop(name)

    def _compressed(self, record: dict[str, Any], name: str) -> CompressedKVCache:
        kv, keep_fetched = record.get("kv"), record.get("keep_fetched")
        if not isinstance(kv, str) or len(kv) > _MAX_SPEC or not isinstance(keep_fetched, bool):
            raise DamagedError(_LAYERS)
        config = CompressionConfig.parse(kv)
        state: list[Any] = [replace(config, backend=self._backend).spec(), keep_fetched]
        if len(record) > 3:
            numbers = [_number(record, field) for field in _NUMBERS]
            if len(record) != 3 + len(numbers) or not all(numbers):
                raise DamagedError(_LAYERS)
            state += [*numbers, *self._content(config, numbers, name)]
        return CompressedKVCache.from_state(state)

    def _content(self, config: CompressionConfig, numbers: list[int], name: str) -> list[mx.array]:
        """The arrays of a layer's state, once their shapes fit its `_NUMBERS`."""
        offset, heads, k_dim, v_dim = numbers
        stored = Format.of(config.k_bits, config.v_bits, k_dim, v_dim)
        k, v = self._take(f"{name}.k"), self._take(f"{name}.v")
        exact = k.shape[1] if k.ndim == 3 else 0
        _expect(k, (heads, exact, padded(k_dim)), _FLOATS)
        _expect(v, (heads, exact, padded(v_dim)), _FLOATS)
        if f"{name}.blocks" not in self.tensors:
            if offset != exact:
                raise DamagedError(_COUNTS)
            return [k, v]
        blocks, slots = divmod(offset - exact, TILE)
        # Every head keeps every token (policy=keep_all), and the body is made of full blocks.
        if blocks < 1 or slots or exact < config.sink_tokens:
            raise DamagedError(_COUNTS)
        rest = [self._take(f"{name}.{x}") for x in ("mu_k", "mu_v", "blocks", "lengths")]
        mu_k, mu_v, pool, lengths = rest
        _expect(mu_k, (heads, padded(k_dim)), (mx.float32,))
        _expect(mu_v, (heads, padded(v_dim)), (mx.float32,))
        _expect(pool, (heads * blocks, stored.words), (mx.uint32,))
        _expect(lengths, (heads,), (mx.int32,))
        if not bool((lengths == blocks * TILE).all()):
            raise DamagedError(_COUNTS)
        arrays = [k, v, mu_k, mu_v, pool, _in_order(heads, blocks), lengths]
        if config.equalize:
            arrays.append(self._take(f"{name}.key_scales"))
            _expect(arrays[-1], (heads, k_dim), (mx.float32,))
        return arrays


def _in_order(heads: int, blocks: int) -> mx.array:
    return mx.arange(heads * blocks, dtype=mx.int32).reshape(heads, blocks)


def _number(record: dict[str, Any], name: str) -> int:
    """A whole number from 1 to what `_NUMBERS` allows, else 0."""
    value = record.get(name)
    return value if type(value) is int and 0 < value <= _NUMBERS[name] else 0


def _expect(array: mx.array, shape: tuple[int, ...], dtypes: tuple[mx.Dtype, ...]) -> None:
    if array.shape != shape or array.dtype not in dtypes:
        raise DamagedError("it has a tensor of the wrong shape or dtype")
