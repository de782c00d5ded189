"""Layers whose codes keep some key channels of some heads, against NumPy that knows no tier."""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache
from leankv_mlx.cache.judging import judge, judge_window
from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.memory import planned
from leankv_mlx.cache.persistence import load, save
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.rotation import signs
from leankv_mlx.errors import ConfigError, DroppedTokensError
from leankv_mlx.kernels import available_backends
from leankv_mlx.policies import DROP, HIGH, LOW
from leankv_mlx.sparsity import LargestReceived
from tests import oracle

HEADS, GROUP, DIM, V_DIM = 4, 2, 96, 64
GROUPS = (2, 0, 3, 2)
SINKS, WINDOW = 4, 64
BACKENDS = [name for name in ("reference", "cpu") if available_backends()[name] is None]

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
        self.cache = CompressedKVCache(kv, exact_dtype=mx.float32, learned=self.channels)
        self.keys, self.values = (np.zeros((HEADS, 0, d), np.float32) for d in (DIM, V_DIM))
        self.whole = 0  # tokens that left the window with all channels

    @property
    def layer(self) -> Layer:
        assert self.cache.layer is not None
        return self.cache.layer

    @property
    def left(self) -> int:
        """Tokens that have left the window."""
        layer = self.cache.layer
        return layer.offset - layer.exact.k.shape[1] if layer and layer.body else 0

    @staticmethod
    def rows(seed: int, tokens: int) -> list[mx.array]:
        """Queries, keys and values of new tokens."""
        q = drawn(seed, HEADS * GROUP, tokens, DIM) / 4
        k, v = drawn(seed + 1, HEADS, tokens, DIM), drawn(seed + 2, HEADS, tokens, V_DIM)
        return [mx.array(x) for x in (q, k, v)]

    def step(self, tokens: int, seed: int) -> Array:
        """What attention gives to new tokens, [Hq, L, Dv]."""
        q, k, v = self.rows(seed, tokens)
        before, began = self.left, self.cache.layer is not None and self.layer.narrowed
        fetch = self.cache.update(k, v)
        if not began:
            self.whole = self.left
        self.codes = self.left if tokens <= 8 else before
        out = fetch.attend(q, scale=DIM**-0.5, mask="causal" if tokens > 1 else None)
        mx.eval(out)
        self.keys = np.concatenate([self.keys, np.array(k[0])], axis=1)
        self.values = np.concatenate([self.values, np.array(v[0])], axis=1)
        self.queries, self.out = np.array(q[0]), np.array(out[0])
        return self.out

    def check(self) -> None:
        """Whether the plain rules give the same."""
        wanted = self.attention(self.queries, self.codes)
        assert np.abs(self.out - wanted).max() < 2e-3 * np.abs(wanted).max()

    def copy(self) -> Run:
        other = copy(self)
        other.cache = deepcopy(self.cache)
        return other

    def reply(self) -> None:
        """The prompt is in."""
        began = self.layer.narrowed
        self.cache.sequence.end_prompt()
        if not began:
            self.whole = self.left

    def trim(self, n: int) -> None:
        self.cache.trim(n)
        self.whole = min(self.whole, self.left)
        self.keys, self.values = (x[:, : x.shape[1] - n] for x in (self.keys, self.values))

    def attention(self, queries: Array, left: int) -> Array:
        """Of the last tokens over all, where so many behind the sink tokens are codes."""
        length, total = queries.shape[1], self.keys.shape[1]
        seen = np.arange(total) <= np.arange(total - length, total)[:, None]
        out = []
        for head in range(HEADS):
            k, v, there = self.head(head, left)
            for q in queries[head * GROUP : (head + 1) * GROUP].astype(np.float64):
                scores = np.where(seen & there, q @ k.T * DIM**-0.5, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out.append(weights / weights.sum(-1, keepdims=True) @ v)
        return np.stack(out)

    def head(self, head: int, left: int) -> tuple[Array, Array, Array]:
        """Keys and values of a head, those that are codes as they are decoded, and which of them it
        has. What is dropped of a key is its center."""
        k, v = (x[head].astype(np.float64) for x in (self.keys, self.values))
        kept = self.channels.groups[head] if self.layer.narrowed else DIM // 32
        stored = slice(SINKS, SINKS + left)
        there = np.ones(len(k), bool)
        there[stored] = kept > 0
        if not kept or not left:
            return k, v, there
        body = self.layer.body
        assert body is not None
        mu_k, mu_v = (np.array(x[head], np.float64) for x in body.centers)
        scales, order = self.scales(head), np.array(self.channels.order[head])
        sides = self.rotated(head, stored)
        coded = [sides[0] - mu_k, sides[1] - mu_v]
        if whole := min(self.whole, left):
            again = oracle.encode(coded[0][:whole], self.cache.config.tiers[0][0])
            coded[0][:whole] = oracle.decode(*again, self.cache.config.tiers[0][0])
        coded[0][:, 32 * kept :] = 0
        if self.cache.config.policy.drops:  # which tokens stay is up to the policy
            slots = body.describe()
            at, names = slots.positions[head] - SINKS, slots.tiers[head]
            tiers = np.full(left, DROP)
            tiers[at[names != DROP]] = names[names != DROP]
        else:
            tiers = np.full(left, HIGH)
        there[stored] = tiers != DROP
        for name, bits in zip((HIGH, LOW), self.cache.config.tiers, strict=False):
            for side, dim in ((0, 32 * kept), (1, V_DIM)):
                here = tiers >= name
                if side == 0 and name == HIGH:
                    here &= np.arange(left) >= whole  # those are codes already
                if not here.any():
                    continue
                mine = here[:, None] & (np.arange(coded[side].shape[1]) < dim)
                again = oracle.encode(coded[side][here, :dim], bits[side])
                coded[side][mine] = oracle.decode(*again, bits[side]).ravel()
        k[stored.start : stored.stop, order] = ((coded[0] + mu_k) @ ROTATION) * scales[order]
        v[stored] = (coded[1] + mu_v) @ oracle.rotation(V_DIM)
        return k, v, there

    def scales(self, head: int) -> Array:
        """What the channels of the keys are divided by."""
        equalizer = self.layer.space.equalizer
        return np.array(equalizer.scales[head]) if equalizer else np.ones(DIM)

    def rotated(self, head: int, tokens: slice) -> list[Array]:
        """Keys and values as they are before they are centered."""
        order = np.array(self.channels.order[head])
        keys = (self.keys[head, tokens] / self.scales(head))[:, order]
        return [keys @ ROTATION.T, self.values[head, tokens] @ oracle.rotation(V_DIM).T]


ROTATION = np.kron(np.eye(DIM // 32), oracle.hadamard_matrix(32) / 32**0.5) * signs(DIM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv", ["k8v4", "k4v4", "k2v3"])
def test_codes_keep_some_channels_and_exact_rows_all(kv: str, backend: str) -> None:
    run = Run(f"leankv:{kv},mask=some,backend={backend}")
    for i, tokens in enumerate((150, 200, 7, *(1,) * 70, 3, 40, 1)):
        run.step(tokens, 10 * i)
        if tokens > 1 or i % 20 == 0:
            run.check()
    run.check()
    assert run.layer.body is not None
    for head in range(HEADS):
        first = run.rotated(head, slice(SINKS, SINKS + 64))  # what the first call let out
        for rows, center in zip(first, run.layer.body.centers, strict=True):
            assert np.abs(rows.mean(axis=0) - np.array(center[head])).max() < 1e-4
    lengths = sum(np.array(tier.lengths) for tier in run.layer.view().tiers)
    assert lengths.tolist() == [run.left if kept else 0 for kept in GROUPS]
    assert run.left > 350


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "policy",
    ["threshold,low=k3v2,alpha_high=2.6,alpha_low=2", "budget,ratio=6,low=k3v2", "streaming"],
)
def test_policies_demote_and_drop_what_a_mask_lets_heads_hold(policy: str, backend: str) -> None:
    run = Run(f"leankv:k8v4,mask=some,window=32,backend={backend},policy={policy}")
    for i, tokens in enumerate((700, 30, *(1,) * 45)):
        run.step(tokens, 10 * i)
        if tokens == 1 and i % 15 == 0:
            run.check()
    run.check()
    assert run.layer.body is not None
    tiers = run.layer.body.describe().tiers
    names = {HIGH, LOW} if "low" in policy else set()
    assert {*tiers[0].tolist(), *tiers[2].tolist()} - {DROP} == names
    held = np.count_nonzero(tiers != DROP)
    assert run.layer.placed and held == run.layer.body.slots < 0.9 * 3 * run.left
    assert (tiers[1] == DROP).all()  # it keeps no channels
    bits = {tier.format for tier in run.layer.view().tiers}
    assert len(bits) == 2 * len(names)  # each of 2 and 3 groups


def test_tokens_are_judged_as_they_are_without_a_mask() -> None:
    """By heads that keep all channels, whose order changes nothing; the others have no tokens."""
    kv, groups = "leankv:k8v8,policy=threshold,alpha_high=0,alpha_low=0", (3, 0, 3, 3)
    masked, plain = Run(f"{kv},mask=some", channels(groups)), Run(kv)
    plain.cache = CompressedKVCache(kv, exact_dtype=mx.float32)
    found: list[list[Array]] = []
    for run in (masked, plain):
        run.step(400, 0)
        run.reply()
        run.layer.collector = LargestReceived()
        run.step(70, 1)
        collected = run.layer.collector.scores
        assert collected is not None
        for i in range(5):
            run.step(1, 10 * i)
        window = judge_window(run.layer)
        assert window is not None
        found.append([np.array(x) for x in (collected, window, *judge(run.layer))])
    holding = [head for head in range(HEADS) if groups[head]]
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours[holding], theirs[holding], rtol=0.05, atol=1e-5)
    assert not found[0][0][1].any() and not found[0][2][1].any()


@pytest.mark.parametrize("groups", [GROUPS, (0, 0, 0, 0), (3, 3, 3, 0)], ids=str)
def test_a_layer_is_cut_at_any_depth(groups: tuple[int, ...]) -> None:
    run = Run("leankv:k8v4,mask=some,window=64", channels(groups))
    run.step(330, 0)
    run.reply()
    for i, (cut, then) in enumerate(((20, 30), (130, 1), (7, 40), (50, 70), (1, 3), (200, 5))):
        run.trim(cut)
        assert run.cache.offset == run.keys.shape[1]
        for j, tokens in enumerate((then, 1)):
            run.step(tokens, 100 * i + 10 * j + 7)
            run.check()
    run.trim(run.cache.offset - 3)  # into the sink tokens: what follows is fitted anew
    assert run.layer.body is None
    for tokens in (150, 60, 1):
        run.step(tokens, 900 + tokens)
        run.check()


def test_forks_share_codes_and_go_their_own_way(tmp_path: Path) -> None:
    """Rows that copies have in common are encoded once, in the tiers of each share of the heads."""
    run = Run("leankv:k4v4,mask=some")
    run.step(400, 0)
    run.reply()
    copies = [run.copy() for _ in range(3)]
    for j, each in enumerate(copies):
        for i in range(40):
            each.step(1, 1000 * j + 10 * i)
        each.check()
    for tables in zip(*(each.layer.body.tables for each in copies if each.layer.body), strict=True):
        assert len({id(table.pool) for table in tables}) == 1
        assert len(np.unique(np.concatenate([table.owned for table in tables]))) == len(
            tables[0].owned
        )
    save(tmp_path / "cache", [copies[0].cache])
    copies[1].cache = load(tmp_path / "cache").caches[0]
    copies[1].keys, copies[1].values = copies[0].keys, copies[0].values
    assert copies[1].cache.learned == copies[0].cache.learned
    for tokens in (1, 40, 1):
        both = [each.step(tokens, 5000 + tokens) for each in copies[:2]]
        assert (both[0] == both[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("more", ["", ",policy=threshold,alpha_low=0.5", ",equalize=off"])
def test_sequences_of_a_batch_get_what_they_get_alone(backend: str, more: str) -> None:
    kv = f"leankv:k4v4,mask=some,backend={backend}{more}"
    alone = [Run(kv) for _ in range(3)]
    for i, tokens in enumerate((300, 20, 130)):
        alone[i].step(tokens, i)
    batch = BatchedKVCache.merge([run.cache for run in alone])
    for i in range(50):
        length = 3 if i == 5 else 1
        mask = None if length == 1 else "causal"
        rows = [run.rows(100 * i + 10 * j, length) for j, run in enumerate(alone)]
        q, k, v = (mx.concatenate(parts) for parts in zip(*rows, strict=True))
        together = batch.update(k, v).attend(q, scale=DIM**-0.5, mask=mask)
        for j, run in enumerate(alone):
            q, k, v = rows[j]
            mine = run.cache.update(k, v).attend(q, scale=DIM**-0.5, mask=mask)
            assert mx.array_equal(together[j], mine[0]), (i, j)


def test_only_layers_of_one_mask_are_taken_together() -> None:
    runs = [Run("leankv:k4v4,mask=some", channels(seed=seed)) for seed in (5, 5, 6)]
    for run in runs:
        run.step(9, 0)
    kinds = [run.layer.kind for run in runs]
    assert kinds[0] == kinds[1] != kinds[2]


@pytest.mark.skipif(len(BACKENDS) < 2, reason="the native backend is not here")
@pytest.mark.parametrize("more", ["", ",policy=budget,ratio=12", ",policy=threshold,low=k3v2"])
def test_backends_agree(more: str) -> None:
    runs = [Run(f"leankv:k4v4,mask=some,backend={name}{more}") for name in BACKENDS]
    for i, tokens in enumerate((1500, 200, *(1,) * 40)):
        a, b = (run.step(tokens, 10 * i) for run in runs)
        assert np.abs(a - b).max() < 2e-3 * np.abs(a).max(), i


def test_nothing_reads_a_layer_whose_heads_are_stored_apart() -> None:
    run = Run("leankv:k4v4,mask=some")
    run.step(200, 0)
    run.reply()
    keys, _ = run.cache.update_and_fetch(*run.rows(9, 1)[1:])
    with pytest.raises(DroppedTokensError, match="a mask of channels; use policy=keep_all, and no"):
        mx.array(keys)  # type: ignore[arg-type]
    with pytest.raises(DroppedTokensError):
        run.cache.make_mask(3, return_array=True)
    # Heads that keep as many channels are tokens in order, as they are without a mask.
    even = Run("leankv:k4v4,mask=some", channels((2, 2, 2, 2)))
    even.step(200, 0)
    even.reply()
    keys, values = even.cache.update_and_fetch(*even.rows(9, 1)[1:])
    even.keys, even.values = (np.concatenate([x, np.array(y[0, :, -1:])], axis=1)
                              for x, y in ((even.keys, keys), (even.values, values)))  # fmt: skip
    for head in range(HEADS):
        for found, wanted in zip((keys, values), even.head(head, even.left)[:2], strict=True):
            assert np.abs(np.array(found[0, head]) - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("groups", [GROUPS, (0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3)], ids=str)
def test_bytes_fall_by_what_is_dropped(groups: tuple[int, ...]) -> None:
    """Of keys by the share of the channels, of values by the share of the heads that keep none."""
    masked, whole = (Run("leankv:k4v4,mask=some", channels(g)) for g in (groups, (3, 3, 3, 3)))
    for run in (masked, whole):
        for i, tokens in enumerate((700, 512, 300)):
            run.step(tokens, i)
    before = masked.cache.memory()
    assert before == whole.cache.memory()  # until the prompt is in
    plan = planned(masked.cache.config, 1512, HEADS, DIM, V_DIM, 4, chunk=512)
    assert replace(before, allocated=0) == replace(plan, allocated=0)
    masked.reply()
    found, full = masked.cache.memory(), whole.cache.memory()
    holding = sum(map(bool, groups))
    k_codes, v_codes = (whole.left * HEADS * d * 4 // 8 for d in (DIM, V_DIM))
    assert full.codes == k_codes + v_codes
    assert found.codes == k_codes * sum(groups) / 12 + v_codes * holding / 4
    assert found.scales == full.scales * holding / 4
    assert (found.exact, found.centers) == (full.exact, full.centers)
    assert found.allocated == found.used  # in pools just as large


def test_a_mask_needs_its_channels_and_channels_their_shape() -> None:
    with pytest.raises(ConfigError, match="mask=some is known by its name alone"):
        CompressedKVCache("leankv:mask=some")
    run = Run("leankv:k4v4,mask=some", channels((2, 0, 3)))
    with pytest.raises(ConfigError, match="for 3 heads of 96 key channels, but this layer has 4"):
        run.step(9, 0)
