"""A Llama in PyTorch with the maths, parameter names and folder format of mlx-lm's `llama`.

Norms, rotary angles and the tied output projection agree with `mlx_lm.models.llama`, so a folder
written by `training.export` loads there unchanged (tests/training compares the logits).
Shapes: B sequences, L new positions, S cached and new positions, H heads, D head_dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]
"""For every layer the keys and values seen so far, each [B, H_kv, S, D]."""


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that decide the shapes and the maths."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the `config.json` of a model folder; other fields are ignored."""
        raw = json.loads((folder / "config.json").read_text())
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (half-split pairs)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: [B, L, hidden]; returns the same shape and the keys and values up to here."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, *rope), _rotate(k, *rope)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        group = self.heads // self.kv_heads
        out = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(group, dim=1),
            v.repeat_interleave(group, dim=1),
            is_causal=length > 1,  # one new position sees everything
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, H, L, D], cos and sin: [L, D/2]; channel i turns with channel i + D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and with a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), rope, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Trunk(nn.Module):
    """The parameters under the prefix `model.` of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Tokens -> hidden states; `logits` applies the tied output projection."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)
        self._initialise()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder in the mlx-lm format, weights widened to float32."""
        model = cls(ModelConfig.read(folder))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return model

    def _initialise(self) -> None:
        """Normal(0, 0.02); projections into the residual stream are shrunk by its depth."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                inward = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers if inward else 1
                nn.init.normal_(weight, std=0.02 / depth**0.5)

    def forward(self, tokens: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """tokens: [B, L] -> (hidden [B, L, hidden], cache of S positions)."""
        seen = past[0][0].shape[2] if past else 0
        if past and tokens.shape[1] > 1:
            raise ValueError(f"[Llama] expected one token after a cache, got {tokens.shape[1]}.")
        positions = torch.arange(seen, seen + tokens.shape[1], dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies)
        rope = angles.cos(), angles.sin()
        x: Tensor = self.model.embed_tokens(tokens)
        cache: Cache = []
        for i, layer in enumerate(self.model.layers):
            x, present = layer(x, rope, past[i] if past else None)
            cache.append(present)
        return self.model.norm(x), cache

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden] -> [..., vocab]."""
        return F.linear(hidden, self.model.embed_tokens.weight)


@torch.inference_mode()
def generate(model: Llama, prompt: list[int], limit: int, stop: int) -> list[int]:
    """Greedy continuation of `prompt`, at most `limit` tokens, without the `stop` token."""
    tokens = torch.tensor([prompt])
    cache: Cache | None = None
    reply: list[int] = []
    while len(reply) < limit:
        hidden, cache = model(tokens, cache)
        best = int(model.logits(hidden[0, -1]).argmax())
        if best == stop:
            break
        reply.append(best)
        tokens = torch.tensor([[best]])
    return reply
