"""What gates leave of keys, against plain NumPy and against the cache with that mask."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from numpy.typing import NDArray

from leankv_mlx.cache import Sequences
from leankv_mlx.cache.fetch import hand_out
from leankv_mlx.kernels import Mask, Rows
from leankv_mlx.learning.beginning import Beginning, read
from leankv_mlx.learning.gates import Gates, _Gated, logits
from leankv_mlx.learning.masks import divergence, gates_of
from leankv_mlx.mlx_lm import attach, make_caches
from leankv_mlx.mlx_lm.patches import asking
from leankv_mlx.mlx_lm.reading import prefill
from tests.learning.tiny import drawn, lessons, masks
from tests.models import KV_HEADS, TINY

SINKS, WINDOW = 4, 64
KEY = mx.random.key(3)
MODELS = [("llama", 64), ("llama", 80), ("gpt_oss", 64), ("gemma3", 64), ("deepseek_v2", 64)]

Array = NDArray[Any]


class Plain:
    """A cache whose attention is written down token by token."""

    def __init__(self, rows: Rows, channels: mx.array, heads: mx.array) -> None:
        self.offset = rows.k.shape[1]
        self.channels, self.heads = np.array(channels), np.array(heads)
        self.rows = [np.array(x.astype(mx.float32), np.float64) for x in rows]
        body = (min(self.offset, 512) - SINKS - WINDOW) // 32 * 32
        self.center = self.rows[0][:, SINKS : SINKS + body].mean(axis=1)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        new = (np.array(x[0], np.float64) for x in (keys, values))
        pairs = zip(self.rows, new, strict=True)
        self.rows = [np.concatenate(pair, axis=1) for pair in pairs]
        return hand_out((keys, values), self)

    def attend(
        self, queries: mx.array, *, scale: float, mask: Mask, sink_logits: mx.array | None = None
    ) -> mx.array:
        q = np.array(queries[0], np.float64) * scale
        k, v = self.rows
        out = np.zeros((*q.shape[:2], v.shape[2]))
        for i, j in np.ndindex(*q.shape[:2]):
            head, at = i // (q.shape[0] // k.shape[0]), self.offset + j
            logit = None if sink_logits is None else float(sink_logits[i])
            middle = range(SINKS, at - WINDOW)
            keys = k[head, : at + 1].copy()
            for token in middle:
                keys[token] -= (1 - self.channels[head]) * (keys[token] - self.center[head])
            with_them = attention(q[i, j], keys, v[head, : at + 1], logit)
            others = [token for token in range(at + 1) if token not in middle]
            without = attention(q[i, j], keys[others], v[head, others], logit)
            out[i, j] = self.heads[head] * with_them + (1 - self.heads[head]) * without
        return mx.array(out.astype(np.float32))[None]


def attention(q: Array, keys: Array, values: Array, sink_logit: float | None) -> Array:
    weights = np.exp(keys @ q)
    mass = weights.sum() + (0 if sink_logit is None else np.exp(sink_logit))
    found: Array = weights @ values / mass
    return found


def opened(name: str, dim: int, tokens: list[int]) -> tuple[nn.Module, Beginning]:
    model = TINY[name](dim)
    with asking(model):
        (beginning,) = read(model, tokens, [len(tokens)])
    return model, beginning


@pytest.mark.parametrize(("name", "dim"), MODELS)
@pytest.mark.parametrize("binary", [True, False])
def test_what_gates_leave_is_written_down(name: str, dim: int, binary: bool) -> None:
    """Sink tokens and window whole, of the others what gates leave, around the center of the first
    ones; none of a head that is empty; query heads share the keys of theirs; sink logits."""
    model, beginning = opened(name, dim, drawn(150))
    shape = len(beginning.rows), *next(iter(beginning.rows.values())).k.shape[::2]
    mask = masks(*shape)
    assert (mask.channels == 0).any() and ((mask.channels > 0) & (mask.channels < dim)).any()
    gates = gates_of(mask)
    if not binary:
        gates = Gates(mx.array(mask.alphas), mx.random.uniform(shape=shape[:2], key=KEY))
    plain = {
        place: Plain(rows, gates.channels[i], gates.heads[i])
        for i, (place, rows) in enumerate(beginning.rows.items())
    }
    behind = drawn(3, seed=1)
    with asking(model):
        found = logits(model, beginning, behind, gates)
        whole = logits(model, beginning, behind, None)
        wanted = model(mx.array([behind]), cache=beginning.caches(plain))[0]
    assert mx.abs(found - wanted).max() < 2e-4 * mx.abs(wanted).max()
    assert mx.abs(whole - wanted).max() > 2e-2 * mx.abs(wanted).max()


def test_a_long_beginning_has_the_center_of_its_first_chunk() -> None:
    model, beginning = opened("llama", 64, drawn(600))
    mask = masks(3, KV_HEADS, 64)
    gates = gates_of(mask)
    plain = {}
    for i, (place, rows) in enumerate(beginning.rows.items()):
        plain[place] = Plain(rows, gates.channels[i], gates.heads[i])
        wanted = rows.k[:, SINKS : SINKS + 416].mean(axis=1)
        assert np.abs(plain[place].center - np.array(wanted)).max() < 1e-6
    with asking(model):
        found = logits(model, beginning, [7], gates)
        wanted = model(mx.array([[7]]), cache=beginning.caches(plain))[0]
    assert mx.abs(found - wanted).max() < 2e-4 * mx.abs(wanted).max()


@pytest.mark.parametrize(
    ("name", "dim", "tokens"),
    [("llama", 64, 580), ("llama", 80, 196), ("gpt_oss", 64, 260), ("gemma3", 64, 292)],
)
def test_gates_of_a_mask_are_what_the_cache_does_with_it(name: str, dim: int, tokens: int) -> None:
    """Where its window is at its smallest; codes of 8 bits are nearly exact."""
    text = drawn(tokens + 1)
    model, beginning = opened(name, dim, text[:-1])
    mask = masks(len(beginning.rows), KV_HEADS, dim)
    with asking(model):
        found = logits(model, beginning, text[-1:], gates_of(mask))
        whole = logits(model, beginning, text[-1:], None)
    with attach(model, "leankv:k8v8,mask=trial,equalize=on", learned=mask.layers):
        caches = make_caches(model)
        prefill(model, text[:-1], caches)
        Sequences.of(caches).narrow()
        wanted = model(mx.array([text[-1:]]), cache=caches)[0]
    size = mx.abs(wanted).max()
    assert mx.abs(whole - wanted).max() > 0.4 * size
    assert mx.abs(found - wanted).max() < 0.03 * size


def test_open_gates_change_nothing() -> None:
    text = drawn(220)
    for name in ("llama", "gpt_oss"):
        model, beginning = opened(name, 64, text[:200])
        heads = len(beginning.rows), KV_HEADS
        with asking(model):
            whole = logits(model, beginning, text[200:], None)
            gates = Gates(mx.ones((*heads, 64)), mx.ones(heads))
            found = logits(model, beginning, text[200:], gates)
        wanted = model(mx.array([text]))[0, 200:]
        assert mx.abs(whole - wanted).max() < 1e-3
        assert mx.abs(found - whole).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    model = TINY[name](64)
    lesson = lessons(model).answers[0]
    heads = len(lesson.beginning.rows), KV_HEADS
    at = [mx.random.uniform(0.2, 0.8, shape, key=KEY) for shape in ((*heads, 64), heads)]
    with asking(model):

        def loss(gates: list[mx.array]) -> mx.array:
            return divergence(model, lesson, Gates(*gates))

        for i, gradient in enumerate(mx.grad(loss)(at)):
            for direction in (mx.sign(gradient), mx.random.normal(gradient.shape, key=KEY)):
                step = 5e-3 * direction
                up, down = ([*at[:i], x, *at[i + 1 :]] for x in (at[i] + step, at[i] - step))
                wanted = float(loss(up) - loss(down)) / 2
                assert float((gradient * step).sum()) == pytest.approx(wanted, rel=0.05, abs=2e-6)


def test_a_head_without_tokens_is_told_what_they_would_change() -> None:
    """So that it can come back; its channels matter to nothing."""
    draw = np.random.default_rng(2)
    k, v, q, toward = (
        mx.array(draw.standard_normal(shape).astype(np.float32))
        for shape in ((2, 200, 64), (2, 200, 64), (1, 4, 3, 64), (1, 4, 3, 64))
    )

    def heard(held: mx.array, channels: mx.array) -> mx.array:
        layer = _Gated(Rows(k[:, :-3], v[:, :-3]), (channels, held))
        layer.update_and_fetch(k[None, :, -3:], v[None, :, -3:])
        return layer.attend(q, scale=0.125, mask="causal")

    def loss(held: mx.array, channels: mx.array) -> mx.array:
        return (heard(held, channels) * toward).sum()

    half, ends = mx.full((2, 64), 0.5), [mx.array([0.0, 1.0]), mx.array([1.0, 1.0])]
    to_head, to_channels = mx.grad(loss, argnums=(0, 1))(ends[0], half)
    difference = float(loss(ends[1], half) - loss(ends[0], half))
    assert float(to_head[0]) == pytest.approx(difference, rel=1e-3)
    assert not to_channels[0].any() and to_channels[1].all()
    near = mx.concatenate([k[0, :4], k[0, 133:198]]), mx.concatenate([v[0, :4], v[0, 133:198]])
    alone = mx.softmax(q[0, :2, 0] @ near[0].T * 0.125, axis=-1) @ near[1]
    assert mx.abs(heard(ends[0], half)[0, :2, 0] - alone).max() < 1e-5
