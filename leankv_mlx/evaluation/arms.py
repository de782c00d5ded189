"""What is compared: the uncompressed cache, always there, and settings of the compressed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from leankv_mlx.cache import end_prompt
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ModelError
from leankv_mlx.mlx_lm.attachment import attach, make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.precision import weights_dtype
from leankv_mlx.mlx_lm.repetition import judges_by_repetition, settle_document
from leankv_mlx.mlx_lm.usage import Usage, measure

NONE = "none"
DEFAULT_KV = ("k8v8", "k8v4", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
PREFILL_CHUNK = 512
"""Tokens per prefill call: small, so that most of a prompt re-reads the compressed cache."""

_PREFIX = "leankv:"


@dataclass(frozen=True)
class Arm:
    """One cache; `config` is None for the uncompressed one."""

    kv: str
    config: CompressionConfig | None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read a `--kv`: none, leankv, leankv:SPEC or just SPEC.

        Raises:
            ConfigError: it is not understood.
        """
        text = text.strip()
        if text == NONE:
            return cls(NONE, None)
        if text == _PREFIX.rstrip(":"):
            return cls(text, CompressionConfig())
        name = text.removeprefix(_PREFIX)
        return cls(name, CompressionConfig.parse(_PREFIX + name))

    @property
    def drops(self) -> bool:
        """Whether a policy may drop tokens."""
        return self.config is not None and self.config.policy != "keep_all"

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """The model has this arm's cache inside of the block.

        Raises:
            ModelError: no layer of the model can be compressed.
        """
        if self.config is None:
            yield
            return
        with attach(model, self.config) as attachment:
            if not attachment.compressed_layers:
                reasons = "; ".join(dict.fromkeys(row.reason for row in attachment.report))
                raise ModelError(f"nothing to compress in this model: {reasons}.")
            yield


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """The arms of repeated `--kv`, the uncompressed one first, each once."""
    arms = [Arm.parse(text) for text in (NONE, *(texts or DEFAULT_KV))]
    return list({arm.kv: arm for arm in arms}.values())


def varied(arm: Arm, setting: str, **changes: Any) -> Arm:
    """An arm with some fields of its config changed; `setting` is how the name tells it."""
    assert arm.config is not None  # there is nothing to vary in the uncompressed cache
    return Arm(f"{arm.kv},{setting}", replace(arm.config, **changes))


@dataclass(frozen=True)
class Size:
    """Bytes of an arm's caches at some context, counted from the buffers.

    Attributes:
        bits_per_element: bits per key or value element: codes, scales, tables, centers and
            exact tokens.
        ratio: how many times smaller than the uncompressed cache in the dtype of the weights.
    """

    bits_per_element: float
    ratio: float

    @classmethod
    def of(cls, usage: Usage) -> Size:
        """Beside fp16, from what caches hold."""
        return cls(16 * usage.used / usage.fp16, usage.ratio)


def sizes(loaded: LoadedModel, arms: Sequence[Arm], tokens: mx.array) -> dict[str, Size]:
    """The size of every arm after a prompt of `tokens` [N], by name. `arms` has the uncompressed
    one."""
    used: dict[str, int] = {}
    elements = 1
    for arm in arms:
        with arm.attached(loaded.model):
            caches = make_caches(loaded.model)
            prefill(loaded.model, tokens, caches)
            settle(loaded.model, caches, tokens)
            usage = measure(caches)
        used[arm.kv] = usage.used
        elements = usage.fp16 // 2
    plain = used[NONE] // (2 if weights_dtype(loaded.model) else 1)  # it is float32 then
    return {kv: Size(8 * n / elements, plain / n) for kv, n in used.items()}


def prefill(model: nn.Module, tokens: mx.array, caches: list[Any]) -> None:
    """Read tokens [N] in chunks of `PREFILL_CHUNK`."""
    for start in range(0, tokens.shape[0], PREFILL_CHUNK):
        model(tokens[None, start : start + PREFILL_CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])


def settle(model: nn.Module, caches: list[Any], tokens: mx.array) -> None:
    """The whole prompt, `tokens` [N], is in: policies drop what they drop."""
    if judges_by_repetition(caches):
        settle_document(model, caches, [int(token) for token in np.array(tokens)])
    else:
        end_prompt(caches)


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
