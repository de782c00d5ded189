"""Layers whose codes keep some key channels of some heads, against NumPy that knows no tier."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.cache.layer import Layer
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.rotation import signs
from leankv_mlx.errors import ConfigError
from leankv_mlx.kernels import available_backends
from tests import oracle

HEADS, GROUP, DIM, V_DIM = 4, 2, 96, 64
GROUPS = (2, 0, 3, 2)
SINKS, WINDOW = 4, 64
BACKENDS = [name for name in ("reference", "cpu") if available_backends()[name] is None]
BITS = {"k8v4": (8, 4), "k4v4": (4, 4), "k2v3": (2, 3)}

Array = NDArray[Any]


def channels(groups: tuple[int, ...] = GROUPS, dim: int = DIM, seed: int = 5) -> Channels:
    """Some order of each head."""
    draw = np.random.default_rng(seed)
    order = np.stack([draw.permutation(dim) for _ in groups])
    return Channels.of(order, np.array(groups))


def drawn(seed: int, heads: int, tokens: int, dim: int) -> Array:
    """Rows [1, heads, tokens, dim] whose channels have means and sizes of their own."""
    draw = np.random.default_rng(seed)
    size, mean = (np.random.default_rng(dim + i).gamma(2, 0.5, dim) for i in range(2))
    rows = draw.standard_normal((1, heads, tokens, dim)) * size + mean
    return rows.astype(np.float16).astype(np.float32)


class Run:
    """A masked cache, and all that came to it."""

    def __init__(self, kv: str, kept: Channels | None = None) -> None:
        self.channels = kept or channels()
        self.bits = BITS[kv.split(":")[1].split(",")[0]]
        self.cache = CompressedKVCache(kv, exact_dtype=mx.float32, channels=self.channels)
        self.keys, self.values = (np.zeros((HEADS, 0, d), np.float32) for d in (DIM, V_DIM))

    @property
    def layer(self) -> Layer:
        assert self.cache.layer is not None
        return self.cache.layer

    @property
    def left(self) -> int:
        """Tokens that have left the window."""
        layer = self.cache.layer
        return layer.offset - layer.exact.k.shape[1] if layer and layer.body else 0

    def step(self, tokens: int, seed: int) -> tuple[Array, Array]:
        """What attention gives, [Hq, L, Dv], and what the plain rules give."""
        q = drawn(seed, HEADS * GROUP, tokens, DIM) / 4
        k, v = drawn(seed + 1, HEADS, tokens, DIM), drawn(seed + 2, HEADS, tokens, V_DIM)
        before = self.left
        fetch = self.cache.update(mx.array(k), mx.array(v))
        left = self.left if tokens <= 8 else before
        out = fetch.attend(mx.array(q), scale=DIM**-0.5, mask="causal" if tokens > 1 else None)
        mx.eval(out)
        self.keys = np.concatenate([self.keys, k[0]], axis=1)
        self.values = np.concatenate([self.values, v[0]], axis=1)
        return np.array(out[0]), self.attention(q[0], left)

    def trim(self, n: int) -> None:
        self.cache.trim(n)
        self.keys, self.values = (x[:, : x.shape[1] - n] for x in (self.keys, self.values))

    def attention(self, queries: Array, left: int) -> Array:
        """Of the last tokens over all, where so many behind the sink tokens are codes."""
        length, total = queries.shape[1], self.keys.shape[1]
        seen = np.arange(total) <= np.arange(total - length, total)[:, None]
        out = []
        for head in range(HEADS):
            k, v = self.head(head, left)
            there = np.ones(total, bool)
            if not self.channels.groups[head]:
                there[SINKS : SINKS + left] = False
            for q in queries[head * GROUP : (head + 1) * GROUP].astype(np.float64):
                scores = np.where(seen & there, q @ k.T * DIM**-0.5, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out.append(weights / weights.sum(-1, keepdims=True) @ v)
        return np.stack(out)

    def head(self, head: int, left: int) -> tuple[Array, Array]:
        """Keys and values of a head, those that are codes as they are decoded: what is dropped of
        a key is its center."""
        k, v = (x[head].astype(np.float64) for x in (self.keys, self.values))
        kept, stored = 32 * self.channels.groups[head], slice(SINKS, SINKS + left)
        if not kept or not left:
            return k, v
        body, space = self.layer.body, self.layer.space
        assert body is not None
        mu_k, mu_v = (np.array(x[head], np.float64) for x in body.centers)
        scales = np.array(space.equalizer.scales[head]) if space.equalizer else np.ones(DIM)
        order = np.array(self.channels.order[head])
        centered = (k[stored] / scales)[:, order] @ ROTATION.T - mu_k
        coded = np.zeros_like(centered)
        codes = oracle.encode(centered[:, :kept], self.bits[0])
        coded[:, :kept] = oracle.decode(*codes, self.bits[0])
        k[stored.start : stored.stop, order] = ((coded + mu_k) @ ROTATION) * scales[order]
        turn = oracle.rotation(V_DIM)
        centered = v[stored] @ turn.T - mu_v
        coded = oracle.decode(*oracle.encode(centered, self.bits[1]), self.bits[1])
        v[stored] = (coded + mu_v) @ turn
        return k, v


ROTATION = np.kron(np.eye(DIM // 32), oracle.hadamard_matrix(32) / 32**0.5) * signs(DIM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv", BITS)
def test_codes_keep_some_channels_and_exact_rows_all(kv: str, backend: str) -> None:
    run = Run(f"leankv:{kv},mask=some,backend={backend}")
    sizes = (150, 200, 7, *(1,) * 70, 3, 40, 1)
    for i, tokens in enumerate(sizes):
        found, wanted = run.step(tokens, 10 * i)
        assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max(), (i, tokens)
    lengths = sum(np.array(tier.lengths) for tier in run.layer.view().tiers)
    assert lengths.tolist() == [run.left if kept else 0 for kept in GROUPS]
    assert run.left > 350


def test_a_mask_needs_its_channels_and_channels_their_shape() -> None:
    with pytest.raises(ConfigError, match="mask=some is known by its name alone"):
        CompressedKVCache("leankv:mask=some")
    run = Run("leankv:k4v4,mask=some", channels((2, 0, 3)))
    with pytest.raises(ConfigError, match="for 3 heads of 96 key channels, but this layer has 4"):
        run.step(9, 0)
