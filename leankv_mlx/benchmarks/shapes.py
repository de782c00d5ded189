"""Shapes of models; random weights stand in for the real ones, which need not be there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from leankv_mlx.errors import UsageError

_CUT = re.compile(r"(.+)-(\d+)l")


@dataclass(frozen=True)
class Shape:
    """What determines the time of a model.

    Attributes:
        model_type: the module of mlx-lm that computes it.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def parameters(self) -> int:
        """Weights of the matrices; the embedding is also the head."""
        heads = 2 * (self.query_heads + self.kv_heads) * self.head_dim
        layer = self.hidden * (heads + 3 * self.intermediate)
        return self.layers * layer + self.vocab * self.hidden

    def with_layers(self, layers: int) -> Shape:
        """Fewer layers, and a vocabulary that keeps its share of a step."""
        vocab = max(64, round(self.vocab * layers / self.layers / 64) * 64)
        cut = _CUT.fullmatch(self.name)
        name = f"{cut[1] if cut else self.name}-{layers}l"
        return replace(self, name=name, layers=layers, vocab=vocab)

    def config(self) -> dict[str, Any]:
        """As in config.json."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152),
        Shape("qwen2.5-0.5b", "qwen2", 24, 896, 4864, 14, 2, 64, 151936),
        Shape("qwen3-0.6b", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936),
        Shape("qwen3-1.7b", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936),
        Shape("qwen3-4b", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936),
        Shape("llama-3.2-1b", "llama", 16, 2048, 8192, 32, 8, 64, 128256),
        Shape("llama-3.2-3b", "llama", 28, 3072, 8192, 24, 8, 128, 128256),
        Shape("llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256),
    )
}
DEFAULT_SHAPE = "qwen3-0.6b-8l"
"""Small enough for any machine: 8 of the 28 layers."""


def shape_of(name: str) -> Shape:
    """The shape of a name; `-8l` at its end leaves so many layers.

    Raises:
        UsageError: there is no such shape.
    """
    name = name.strip().lower()
    if name in SHAPES:
        return SHAPES[name]
    cut = _CUT.fullmatch(name)
    if cut and cut[1] in SHAPES and 1 <= int(cut[2]) <= SHAPES[cut[1]].layers:
        return SHAPES[cut[1]].with_layers(int(cut[2]))
    raise UsageError(
        f"unknown shape {name}; use one of {', '.join(SHAPES)}, with -8l at the end for 8 layers."
    )


@dataclass(frozen=True)
class Heads:
    """Heads of one attention layer."""

    query: int
    kv: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Read 32x8x128: query heads, KV heads, head_dim.

        Raises:
            UsageError: it is not understood.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--heads {text} is not understood; use for example 32x8x128.")
        heads = cls(*map(int, parts))
        if heads.query % heads.kv or heads.dim > 256:
            raise UsageError(
                f"--heads {text}: query heads must be a multiple of KV heads, head_dim at most 256."
            )
        return heads
