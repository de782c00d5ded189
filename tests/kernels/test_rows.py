"""What the next caches are made of, from the objects that there are: rows of several sequences in
one view, and heads that keep other channel groups than their neighbours."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.format import Format
from leankv_mlx.kernels import Backend, Centers, Rows, Tier, View, available_backends
from leankv_mlx.kernels import resolve_backend as resolve
from leankv_mlx.kernels.decode_attention import decode_attention
from leankv_mlx.kernels.encode import encode
from tests.kernels import cases

HEADS, GROUP, DIM, BLOCKS = 2, 3, 64, 3
ASKED = {"scale": DIM**-0.5, "mask": None, "sink_logits": None}


@pytest.fixture(params=[name for name, why in available_backends().items() if why is None])
def backend(request: pytest.FixtureRequest) -> Backend:
    return resolve(request.param)


def stored(rows: Rows, format: Format, lengths: list[int], backend: Backend) -> Tier:
    """A tier of rows [H, T, D] of which each head has its first few."""
    heads, tokens, _ = rows.k.shape
    blocks = encode(rows, none(heads), format, "search", backend)
    table = mx.arange(blocks.shape[0] * blocks.shape[1], dtype=mx.int32).reshape(heads, -1)
    pool = blocks.reshape(-1, format.words)
    full = all(length == tokens for length in lengths)
    return Tier(pool, table, mx.array(lengths, mx.int32), format, full)


def none(heads: int) -> Centers:
    return Centers(*(mx.zeros((heads, DIM)) for _ in "kv"))


def drawn(seed: int, heads: int, tokens: int) -> Rows:
    draw = np.random.default_rng(seed)
    return Rows(*(cases.normal(draw, (heads, tokens, DIM)) for _ in "kv"))


def test_two_sequences_are_rows_of_one_view(backend: Backend) -> None:
    """Sequences of other lengths, each with its KV heads, attended to at once and one by one."""
    format = Format((4, 4), (4, 3))
    views = []
    for seed, length in ((1, 90), (2, 33)):
        tier = stored(drawn(seed, HEADS, 32 * BLOCKS), format, [length] * HEADS, backend)
        exact = drawn(seed + 5, HEADS, 5)
        views.append(View([tier], exact, none(HEADS), 2, None))
    queries = [drawn(seed, HEADS * GROUP, 1).k for seed in (8, 9)]
    alone = [
        decode_attention(q, view, backend=backend, **ASKED)
        for q, view in zip(queries, views, strict=True)
    ]
    one, two = (view.tiers[0] for view in views)
    both = View(
        [
            Tier(
                mx.concatenate([one.pool, two.pool]),
                mx.concatenate([one.table, two.table + one.pool.shape[0]]),
                mx.concatenate([one.lengths, two.lengths]),
                format,
                False,
            )
        ],
        Rows(*(mx.concatenate(x) for x in zip(*(view.exact for view in views), strict=True))),
        none(2 * HEADS),
        2,
        None,
    )
    together = decode_attention(mx.concatenate(queries), both, backend=backend, **ASKED)
    assert cases.error(together.out, mx.concatenate([x.out for x in alone])) < 1e-5
    assert cases.error(together.lse, mx.concatenate([x.lse for x in alone])) < 1e-5


def test_heads_keep_other_channel_groups(backend: Backend) -> None:
    """A mask of channel groups per head: each head is in the tier of its format, with length 0 in
    the other one. What is not kept counts as the center, 0."""
    formats = Format((8, 0), (8, 8)), Format((0, 8), (8, 0))  # of the first and of the second head
    rows, tokens = drawn(3, HEADS, 32 * BLOCKS), 32 * BLOCKS
    tiers = [
        stored(rows, format, [tokens if head == i else 0 for head in range(HEADS)], backend)
        for i, format in enumerate(formats)
    ]
    exact = drawn(4, HEADS, 3)
    queries = drawn(5, HEADS * GROUP, 2).k
    view = View(tiers, exact, none(HEADS), 1, None)
    found = decode_attention(queries, view, backend=backend, **ASKED).out

    kept = np.zeros((2, HEADS, 1, DIM))  # of keys and values
    for head, format in enumerate(formats):
        for side, bits in enumerate((format.k_bits, format.v_bits)):
            kept[side, head, 0] = np.repeat(np.array(bits) > 0, 32)
    k, v = (np.concatenate([np.array(x) * mask, np.array(y)], axis=1)
            for x, y, mask in zip(rows, exact, kept, strict=True))  # fmt: skip
    q = np.array(queries).reshape(HEADS, GROUP * 2, DIM) * DIM**-0.5
    weights = np.exp(q @ k.swapaxes(1, 2))
    wanted = (weights / weights.sum(-1, keepdims=True)) @ v
    assert np.abs(np.array(found).reshape(wanted.shape) - wanted).max() < 0.02  # 8-bit codes
    alone = decode_attention(
        queries[:GROUP],
        replace(
            view,
            tiers=[replace(tiers[0], table=tiers[0].table[:1], lengths=tiers[0].lengths[:1])],
            exact=Rows(*(x[:1] for x in exact)),
            centers=none(1),
        ),
        backend=backend,
        **ASKED,
    ).out
    assert cases.error(found[:GROUP], alone) < 1e-5
