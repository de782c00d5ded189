"""What is compared: the uncompressed cache, always there, and settings of the compressed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from leankv_mlx.cache import CompressedKVCache, Sequences, entries
from leankv_mlx.config import UNCOMPRESSED, CompressionConfig, parse_kv
from leankv_mlx.errors import ModelError
from leankv_mlx.mlx_lm.attachment import Attachment, attach, why_not
from leankv_mlx.mlx_lm.repetition import judges_by_repetition, settle_document
from leankv_mlx.mlx_lm.usage import measure
from leankv_mlx.projections.sparsity import Sparsity

DEFAULT_KV = ("k8v8", "k8v4", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")


@dataclass(frozen=True)
class Arm:
    """One cache; `config` is None for the uncompressed one.

    Attributes:
        sparsity: in place of the calibration that `config.sparse` names.
    """

    kv: str
    config: CompressionConfig | None
    sparsity: Sparsity | None = None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read a `--kv`: none, leankv, leankv:SPEC or just SPEC.

        Raises:
            ConfigError: it is not understood.
        """
        return cls(text.strip().removeprefix("leankv:"), parse_kv(text))

    @property
    def drops(self) -> bool:
        """Whether a policy may drop tokens."""
        return self.config is not None and self.config.policy.drops

    @property
    def settles(self) -> bool:
        """Whether something of a prompt goes once it is in, tokens or key channels."""
        return self.config is not None and self.config.settles

    @property
    def sparse(self) -> bool:
        """Whether decode steps leave out channels."""
        return self.config is not None and bool(self.config.sparse)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[Attachment | None]:
        """The model has this arm's cache inside of the block.

        Raises:
            ModelError: no layer of the model can be compressed.
        """
        if self.config is None:
            yield None
            return
        with attach(model, self.config, self.sparsity) as attachment:
            if reason := why_not(attachment):
                raise ModelError(f"nothing to compress in this model: {reason}.")
            yield attachment


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """The arms of repeated `--kv`, the uncompressed one first, each once."""
    arms = [Arm.parse(text) for text in (UNCOMPRESSED, *(texts or DEFAULT_KV))]
    return list({arm.kv: arm for arm in arms}.values())


def varied(arm: Arm, setting: str, **changes: Any) -> Arm:
    """An arm with some fields of its config changed; `setting` is how the name tells it."""
    assert arm.config is not None  # there is nothing to vary in the uncompressed cache
    return Arm(f"{arm.kv},{setting}", replace(arm.config, **changes))


@dataclass(frozen=True)
class Size:
    """Bytes of an arm's caches, counted from the buffers; rows that are not compressed count two
    bytes an element, whatever the model computes in.

    Attributes:
        bits_per_element: bits per key or value element of everything that is kept: codes, scales,
            tables, centers, exact tokens, and layers that are left alone.
        body_bits: bits per element of the codes and their scales alone; 0 where there are none.
        ratio: how many times smaller than the uncompressed cache at two bytes an element.
        whole: every head still has every token, none of them in a lower tier; but for those that a
            mask lets keep nothing.
    """

    bits_per_element: float
    body_bits: float
    ratio: float
    whole: bool = False

    @classmethod
    def of(cls, caches: Sequence[Any]) -> Size:
        """The size of a cache list with tokens in it."""
        used, elements = 0, measure(caches).fp16 // 2
        body_bytes = body_elements = 0
        whole = True
        for cache in entries(caches):
            layer = cache.layer if isinstance(cache, CompressedKVCache) else None
            if layer is None:
                used += measure([cache]).fp16
                continue
            memory = layer.memory()
            used += memory.used - memory.exact + 2 * (layer.exact.k.size + layer.exact.v.size)
            body_bytes += memory.codes + memory.scales
            slots = layer.body.slots if layer.body else 0
            body_elements += slots * (layer.shape.k_dim + layer.shape.v_dim)
            if layer.body:
                between = layer.offset - layer.sinks - layer.recent
                whole &= layer.body.holds(between)
        body_bits = 8 * body_bytes / max(1, body_elements)
        return cls(8 * used / elements, body_bits, 2 * elements / used, whole)


def settle(model: nn.Module, caches: list[Any], tokens: Sequence[int]) -> None:
    """The whole prompt is in: policies drop what they drop, and codes what a mask leaves out."""
    if judges_by_repetition(caches):
        settle_document(model, caches, tokens)
    else:
        Sequences.of(caches).end_prompt()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model computes in float32 inside of the block; afterwards it is as it was.

    float16 and bfloat16 values survive the way there and back.
    """
    dtypes = {name: array.dtype for name, array in _flat(model)}
    model.set_dtype(mx.float32)
    try:
        yield
    finally:
        restored = [(name, array.astype(dtypes[name])) for name, array in _flat(model)]
        model.update(tree_unflatten(restored))


def _flat(model: nn.Module) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
