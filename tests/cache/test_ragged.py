"""Layers whose heads lose tokens, against a dictionary of what each head should hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache, Fetch
from leankv_mlx.cache.fetch import Calls
from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.format import Format
from leankv_mlx.kernels import Centers, Rows, Tier
from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.encode import encode_ops
from leankv_mlx.policies import DROP, HIGH, LOW
from tests.blocks.owners import check_owners

H, G, DIM, SINKS, WINDOW = 2, 2, 32, 4, 32
KV = f"leankv:k8v4,policy=threshold,window={WINDOW},sink_tokens={SINKS},backend=reference"
HEAD_ROWS = tuple[NDArray[Any], NDArray[Any], int]


def round_trip(layer: Layer, head: int, k: NDArray[Any], v: NDArray[Any], bits: Any) -> Rows:
    """Vectors [T, D] of one head through the codec."""
    assert layer.body is not None
    centers = Centers(*(x[head : head + 1] for x in layer.body.centers))
    format = Format.of(*bits, DIM, DIM)
    blocks = encode_ops(Rows(mx.array(k)[None], mx.array(v)[None]), centers, format, "search")
    table = mx.arange(blocks.shape[1], dtype=mx.int32)[None]
    body = Tier(blocks[0], table, mx.array([len(k)]), format, False)
    decoded = dequantize_ops(body, centers, mx.float32)
    return Rows(*(np.array(x[0])[: len(k)] for x in decoded))


@dataclass
class Model:
    """What a layer should hold: per head, position -> (key, value, tier) of its stored tokens."""

    cache: CompressedKVCache
    heads: list[dict[int, HEAD_ROWS]] = field(default_factory=lambda: [{} for _ in range(H)])

    @property
    def layer(self) -> Layer:
        assert self.cache.layer is not None
        return self.cache.layer

    def copied(self, cache: CompressedKVCache) -> Model:
        return Model(cache, [dict(head) for head in self.heads])


def stored(layer: Layer) -> list[dict[int, HEAD_ROWS]]:
    """What it does hold."""
    heads: list[dict[int, HEAD_ROWS]] = [{} for _ in range(H)]
    if layer.body is None:
        return heads
    for tier in layer.body.stored():
        name = HIGH if tier.body.format == Format.of(8, 4, DIM, DIM) else LOW
        k, v = (np.array(x) for x in dequantize_ops(tier.body, layer.body.centers, mx.float32))
        own = range(H) if tier.body.heads is None else tier.body.heads
        for h, positions in zip(own, tier.positions, strict=True):
            for slot, position in enumerate(positions):
                if position >= 0:
                    assert position not in heads[h], "a position twice"
                    heads[h][int(position)] = k[h, slot], v[h, slot], name
    return heads


def agreed(
    held: dict[int, HEAD_ROWS], positions: Sequence[int], rows: tuple[Any, Any], tier: int
) -> dict[int, HEAD_ROWS]:
    """What a head holds there now: what it should, but for one row or a code in a thousand, because
    two implementations round a value between two codes either way."""
    found = [held[int(position)] for position in positions]
    assert all(name == tier for *_, name in found)
    for side, wanted in enumerate(rows):
        far = np.abs(np.stack([row[side] for row in found]) - wanted) > 1e-5
        assert far.sum() <= max(DIM, far.size / 1000)
    return {int(p): row for p, row in zip(positions, found, strict=True)}


def attention(layer: Layer, queries: mx.array) -> NDArray[Any]:
    """Softmax attention in NumPy over what each head holds."""
    exact_k, exact_v = (np.array(x) for x in layer.exact)
    q = np.array(layer.space.rotated(queries))[0]
    outs = []
    for head in range(H * G):
        kept = stored(layer)[head // G].values()
        k = np.concatenate([exact_k[head // G], *(x[None] for x, _, _ in kept)])
        v = np.concatenate([exact_v[head // G], *(x[None] for _, x, _ in kept)])
        scores = q[head] @ k.T
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        outs.append(p @ v / p.sum(axis=1, keepdims=True))
    return np.array(layer.space.rotations[1].undo(mx.array(np.stack(outs)[None])))


def attended(layer: Layer, queries: mx.array, mask: str | None) -> mx.array:
    """The layer's own attention, from codes or over a working copy."""
    layer = layer.copy()  # which then has seen these queries
    rows = None if queries.shape[2] <= 8 else layer.rows()
    nobody = CompressedKVCache(KV).sequence  # it is no layer of that, which then drops nothing
    came = queries.shape[2] if rows else 0
    return Fetch(layer, rows, came, Calls(), nobody).attend(queries, scale=1.0, mask=mask)


class RaggedLayers(RuleBasedStateMachine):
    """Two or more sequences that share blocks."""

    layers = Bundle("layers")
    kv = KV
    channels: Channels | None = None

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Model] = []
        self.seed = 0

    def holding(self, layer: Layer) -> list[int]:
        """The heads that hold stored tokens."""
        kept = self.channels if layer.narrowed else None
        return [h for h in range(H) if kept is None or kept.groups[h]]

    def rows(self, n: int) -> tuple[mx.array, mx.array]:
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        k, v = (rng.standard_normal((1, H, n, DIM)).astype(np.float32) for _ in range(2))
        return mx.array(k), mx.array(v)

    @initialize(target=layers, n=st.integers(1, 300))
    def begin(self, n: int) -> int:
        cache = CompressedKVCache(self.kv, learned=self.channels)
        k, v = self.rows(1)
        cache.update_and_fetch(k, v)
        self.models.append(Model(cache))
        self.append(len(self.models) - 1, n)
        return len(self.models) - 1

    @rule(which=layers, n=st.one_of(st.integers(1, 8), st.integers(40, 200)))
    def append(self, which: int, n: int) -> None:
        model = self.models[which]
        k, v = self.rows(n)
        layer = model.layer
        layer.append(k[0], v[0])
        start, stop = layer.leaving
        moved = [np.array(x[:, start:stop]) for x in layer.exact]
        at = layer.exact_positions[start:stop]
        layer.compress()
        for h in self.holding(layer) if len(at) else ():
            rows = round_trip(layer, h, moved[0][h], moved[1][h], (8, 4))
            model.heads[h] |= agreed(stored(layer)[h], at, rows, HIGH)

    @rule(which=layers, seed=st.integers(0, 1 << 16), keep=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
          low=st.sampled_from([0.0, 0.2, 1.0]), one_head=st.booleans())  # fmt: skip
    def place(self, which: int, seed: int, keep: float, low: float, one_head: bool) -> None:
        model = self.models[which]
        body = model.layer.body
        if body is None:
            return
        rng = np.random.default_rng(seed)
        slots = body.describe()
        plan = slots.tiers.copy()
        chosen = rng.random(plan.shape)
        plan[(chosen < low) & (plan == HIGH)] = LOW
        plan[rng.random(plan.shape) >= keep] = DROP
        if one_head:
            plan[0] = slots.tiers[0]
        lowered: list[tuple[int, list[int], tuple[Any, Any]]] = []
        for h, head in enumerate(model.heads):
            down = []
            for position, old, new in zip(slots.positions[h], slots.tiers[h], plan[h], strict=True):
                if position >= 0 and new == DROP:
                    del head[int(position)]
                elif position >= 0 and (old, new) == (HIGH, LOW):
                    down.append(int(position))
            if down:
                k, v = (np.stack([head[p][side] for p in down]) for side in range(2))
                lowered.append((h, down, round_trip(model.layer, h, k, v, (4, 2))))
        body.place(plan, rng.random(plan.shape).astype(np.float32))
        for h, down, rows in lowered:
            model.heads[h] |= agreed(stored(model.layer)[h], down, rows, LOW)

    @rule(which=layers, n=st.integers(1, 150))
    def trim(self, which: int, n: int) -> None:
        model = self.models[which]
        n = min(n, model.cache.offset - 1)
        assert model.cache.trim(n) == n
        # Without dropped tokens the block that was cut is back in the window.
        window = model.layer.exact.k.shape[1] - model.layer.sinks
        cut = model.cache.offset - window
        for h, head in enumerate(model.heads):
            model.heads[h] = {position: x for position, x in head.items() if position < cut}

    @rule(target=layers, which=layers)
    def fork(self, which: int) -> int:
        model = self.models[which]
        self.models.append(model.copied(model.cache.__deepcopy__({})))
        return len(self.models) - 1

    @rule(which=layers)
    def reload(self, which: int) -> None:
        model = self.models[which]
        with TemporaryDirectory() as folder:
            save(Path(folder) / "cache.safetensors", [model.cache])
            (cache,) = load(Path(folder) / "cache.safetensors", backend="reference").caches
        assert cache.config == model.cache.config
        model.cache = cache

    @rule(which=layers, n=st.sampled_from([1, 3, 20]))
    def attend(self, which: int, n: int) -> None:
        layer = self.models[which].layer
        rng = np.random.default_rng(n)
        queries = mx.array(rng.standard_normal((1, H * G, n, DIM)).astype(np.float32))
        out = attended(layer, queries, None)
        np.testing.assert_allclose(np.array(out), attention(layer, queries), atol=2e-5)

    @invariant()
    def every_head_holds_what_it_should(self) -> None:
        for model in self.models:
            end = model.cache.offset - max(0, model.layer.exact.k.shape[1] - SINKS)
            for held, expected in zip(stored(model.layer), model.heads, strict=True):
                assert held.keys() == expected.keys()
                assert all(SINKS <= position < end for position in held)
                for position, (k, v, tier) in expected.items():
                    assert held[position][2] == tier
                    np.testing.assert_allclose(held[position][0], k, atol=1e-5)
                    np.testing.assert_allclose(held[position][1], v, atol=1e-5)

    @invariant()
    def every_block_has_as_many_owners_as_tables_name_it(self) -> None:
        tables = [t for m in self.models if m.layer.body for t in m.layer.body.tables]
        check_owners(tables)


RaggedLayers.TestCase.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
test_ragged_layers = RaggedLayers.TestCase


class MaskedLayers(RaggedLayers):
    """The same where a head holds no stored token once its layer is narrowed, and the other one has
    another order."""

    kv = f"{KV},mask=some"
    channels = Channels((tuple(range(DIM)), tuple(reversed(range(DIM)))), (0, 1))

    @rule(which=RaggedLayers.layers)
    def narrow(self, which: int) -> None:
        model = self.models[which]
        model.cache.sequence.narrow()
        holding = self.holding(model.layer)
        model.heads = [head if h in holding else {} for h, head in enumerate(model.heads)]


MaskedLayers.TestCase.settings = RaggedLayers.TestCase.settings
test_masked_layers = MaskedLayers.TestCase


def test_a_prefill_over_ragged_heads_is_causal() -> None:
    cache = CompressedKVCache(KV)
    rows = mx.random.normal((1, H, 330, DIM), key=mx.random.key(0))
    cache.update_and_fetch(rows, rows)
    layer = cache.layer
    assert layer is not None and layer.body is not None
    plan = layer.body.describe().tiers.copy()
    plan[0, ::3], plan[1, 50:] = DROP, LOW
    layer.body.place(plan)
    queries = mx.random.normal((1, H * G, 20, DIM), key=mx.random.key(1))
    assert layer.view().present() is not None
    prefill = attended(layer, queries, "causal")[..., -8:, :]
    decode = attended(layer, queries[..., -8:, :], "causal")
    np.testing.assert_allclose(np.array(prefill), np.array(decode), atol=2e-5)
