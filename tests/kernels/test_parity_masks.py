"""Layers of which codes keep some key channels: every backend and instruction set against the
reference, and against what a mask means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.format import Format
from leankv_mlx.codec.space import Space
from leankv_mlx.kernels import Backend, Centers, Rows, Tier, View, resolve_backend
from leankv_mlx.kernels.append import append, append_batch
from leankv_mlx.kernels.decode_attention import decode_attention, decode_attention_batch
from leankv_mlx.kernels.dequantize import dequantize
from leankv_mlx.kernels.encode import encode
from leankv_mlx.kernels.gather import gather
from leankv_mlx.kernels.prefill_attention import prefill_attention
from leankv_mlx.kernels.repack import repack
from tests.kernels import cases, masked
from tests.kernels.cases import FIXED_POINT, TOLERANCE, Case, error, normal
from tests.kernels.masked import HEADS, KEPT, ONE
from tests.kernels.matrix import chosen, every, matrix
from tests.kernels.test_parity import attention, check_attention

REFERENCE = resolve_backend("reference")
ROWS = cases.pairwise(masked.FACTORS)
BATCH: Mapping[str, Sequence[Any]] = {
    name: masked.FACTORS[name]
    for name in ("kept", "k_bits", "head_dims", "levels", "group", "new", "sink_logits", "mask",
                 "dtype", "rotated")
} | {"sequences": (1, 3, 5), "scaled": (False, True)}  # fmt: skip
ASKED: dict[str, Any] = {"scale": 0.125, "mask": None, "sink_logits": None}


@pytest.fixture(params=every())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from chosen(request.param)


@matrix(ROWS, ("kept", "k_bits", "dtype"))
def test_decode_attention(row: dict[str, Any], backend: Backend) -> None:
    check_attention(masked.case(**row), backend)


@pytest.mark.parametrize("tiers", ["none", "without tokens"])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_layer_that_keeps_nothing_attends_to_its_exact_rows(
    rotated: bool, tiers: str, backend: Backend
) -> None:
    """The centers are there, and count with the mass of no token."""
    case = masked.case(**ONE | {"kept": "none", "rotated": rotated, "skip": 0.1})
    assert not case.tiers
    if tiers == "without tokens":
        (tier,) = masked.case(**ONE | {"kept": "one group each"}).tiers
        case = replace(case, tiers=[replace(tier, lengths=mx.zeros_like(tier.lengths))])
    alone = replace(case, tiers=[], centers=None, skip=0.0)
    ours, wanted = attention(case, backend), attention(alone, REFERENCE)
    assert mx.isfinite(ours.out).all() and mx.isfinite(ours.lse).all()
    assert error(ours.out, wanted.out) < TOLERANCE[mx.float32]
    assert error(ours.lse, wanted.lse) < 2e-5
    assert ours.reads is None or ours.reads.sum().item() == 0


def test_heads_of_very_different_lengths_share_the_threads(backend: Backend) -> None:
    case = masked.case(**ONE | {"kept": "other shares", "lengths": "full"}, blocks=130)
    check_attention(case, backend)
    first = attention(case, backend)
    for _ in range(5):
        assert mx.array_equal(attention(case, backend).out, first.out)


def test_more_tiers_than_a_launch_has_buffers(backend: Backend) -> None:
    """Eight numbers of kept groups on two levels, and a head for each."""
    draw, dims, kept = np.random.default_rng(1), (256, 64), range(1, 9)
    tiers = masked.tiers(draw, kept, (4, 4), dims, 2, "ragged", 1)
    assert len(tiers) == 16
    case = Case(
        queries=normal(draw, (8, 1, 256)), tiers=tiers,
        exact=Rows(*(normal(draw, (8, 5, dim)) for dim in dims)),
        centers=Centers(*(normal(draw, (8, dim)) for dim in dims)), scale=1 / 16, sinks=4,
        mask=None, sink_logits=None, rotations=masked.rotations(kept, dims),
    )  # fmt: skip
    check_attention(case, backend)


def drawn(*, sequences: int, scaled: bool, **row: Any) -> tuple[list[Case], list[mx.array | None]]:
    """Sequences of a model, the channels of each kept alike, and the scales of their keys. One has
    no body yet, one nothing in its second level."""
    draw = np.random.default_rng(sequences)
    found: list[Case] = []
    for i in range(sequences):
        case = masked.case(
            **row, v_bits=4, lengths=("full", "ragged")[i % 2], exact=(40, 9, 103)[i % 3] + i,
            blocks=1 + 3 * i % 5,
        )  # fmt: skip
        first = (found or [case])[0]
        tiers = (case.tiers, [], case.tiers[:: row["levels"]])[i % 3]
        found.append(replace(case, tiers=tiers, sink_logits=first.sink_logits))
    size = HEADS, row["head_dims"][0]
    scales: list[mx.array | None] = [
        mx.array(draw.uniform(0.5, 2, size).astype(np.float32)) if scaled and i != 1 else None
        for i in range(sequences)
    ]
    return found, scales


@matrix(cases.pairwise(BATCH), ("kept", "sequences", "dtype"))
def test_a_batch(row: dict[str, Any], backend: Backend) -> None:
    found, scales = drawn(**row | {"scaled": row["scaled"] and row["rotated"]})
    first, dtype = found[0], found[0].queries.dtype
    queries, views = mx.stack([case.queries for case in found]), [case.view for case in found]
    asked = {"scale": first.scale, "mask": first.mask, "sink_logits": first.sink_logits}
    ours, wanted = (
        decode_attention_batch(queries, views, **asked, scales=scales, backend=b)
        for b in (backend, REFERENCE)
    )
    products = FIXED_POINT.get(dtype, 0) if backend.name == "cpu" else 0
    allowed = max(TOLERANCE[dtype if row["rotated"] else mx.float32], products)
    for i, (case, own) in enumerate(zip(found, scales, strict=True)):
        assert error(ours.out[i], wanted.out[i]) < allowed
        assert error(ours.lse[i], wanted.lse[i]) < 2e-5
        scaled = case.queries if own is None else Equalizer(own).queries(case.queries[None])[0]
        alone = decode_attention(scaled, case.view, **asked, backend=backend)
        if backend.name == "cpu":
            assert mx.array_equal(ours.out[i], alone.out)
            assert mx.array_equal(ours.lse[i], alone.lse)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (256, 128)])
def test_append_puts_keys_in_order_and_rotates_them_by_group(
    head_dims: tuple[int, int], dtype: mx.Dtype, backend: Backend
) -> None:
    draw = np.random.default_rng(2)
    rotations = masked.rotations((1, 0), head_dims)
    exact = [
        Rows(*(normal(draw, (2, n, r.dim)).astype(dtype) for r in rotations)) for n in (0, 70, 3)
    ]
    new = Rows(*(normal(draw, (3, 2, 2, dim)).astype(dtype) for dim in head_dims))
    size = 2, head_dims[0]
    scales = [None, *(mx.array(draw.uniform(0.5, 2, size).astype(np.float32)) for _ in range(2))]
    ours, wanted = (
        append_batch(exact, new, rotations, b, scales) for b in (backend, REFERENCE)
    )  # fmt: skip
    for i, old in enumerate(exact):
        for x, y in zip(ours[i], wanted[i], strict=True):
            assert x.dtype == dtype and error(x, y) < TOLERANCE[dtype]
        own = scales[i]
        keys = new.k[i] if own is None else Equalizer(own).apply(new.k[i].astype(mx.float32))
        alone = append(old, Rows(keys, new.v[i]), rotations, backend)
        assert all(error(x, y) < TOLERANCE[dtype] for x, y in zip(alone, ours[i], strict=True))


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_blocks_of_kept_channels(bits: int, kept: int, backend: Backend) -> None:
    """Encoded, decoded and moved, of heads of which one has no token."""
    draw, format = np.random.default_rng(bits), Format((bits,) * kept + (0,) * (4 - kept), (bits,))
    dims = format.k_dim, format.v_dim
    rows = Rows(*(normal(draw, (2, 50, dim)) for dim in dims))
    centers = Centers(*(normal(draw, (2, dim)) for dim in dims))
    blocks = [encode(rows, centers, format, "search", b) for b in (backend, REFERENCE)]
    assert blocks[0].shape == blocks[1].shape == (2, 2, 32 * (bits * (kept + 1) + 1))
    same = np.array(blocks[0]) == np.array(blocks[1])
    assert same.mean() > 0.99

    table = mx.array([[0, 1], [0, 0]], mx.int32)
    body = Tier(blocks[1][0], table, mx.array([50, 0], mx.int32), format, full=False)
    found = [dequantize(body, centers, mx.float32, b) for b in (backend, REFERENCE)]
    for ours, wanted in zip(*found, strict=True):
        assert error(ours[:1, :50], wanted[:1, :50]) < TOLERANCE[mx.float32]
    dropped = found[0].k[0, :50, 32 * kept :]
    assert mx.array_equal(dropped, mx.broadcast_to(centers.k[0, 32 * kept :], dropped.shape))

    index = mx.array(np.stack([np.arange(49, -1, -1), np.full(50, -1)]).astype(np.int32))
    moved = [repack(body, index, b) for b in (backend, REFERENCE)]
    assert mx.array_equal(*moved)
    assert not moved[0][1].any()


@pytest.mark.parametrize("kept", list(KEPT))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_working_copy_of_a_prefill(dtype: mx.Dtype, kept: str, backend: Backend) -> None:
    """Tokens are where their heads have them, and a prefill over them is a decode step."""
    case = masked.case(
        **ONE | {"kept": kept, "levels": 2, "dtype": dtype, "head_dims": (80, 128), "new": 8}
    )
    assert case.rotations is not None
    inside, wide = replace(case.view, rotations=None), 2 * 96 if any(KEPT[kept]) else 0
    present = inside.present()
    lengths = sum((np.array(tier.lengths) for tier in case.tiers), np.zeros(HEADS))
    assert inside.slots == wide  # tiers of other heads stand side by side
    if present is not None:
        assert np.array(present).sum(axis=1).tolist() == (lengths + 40).tolist()
    for view in (case.view, inside):
        found = [gather(view, dtype, b) for b in (backend, REFERENCE)]
        for ours, wanted in zip(*found, strict=True):
            assert ours.shape[1] == 40 + wide and mx.isfinite(ours).all()
            used = mx.ones(ours.shape[:2], mx.bool_) if present is None else present
            pair = (mx.where(used[..., None], x, mx.array(0, dtype)) for x in (ours, wanted))
            assert error(*pair) < TOLERANCE[dtype]
    prefilled = prefill_attention(
        case.queries, found[0], scale=case.scale, mask="causal", present=present,
        sink_logits=None, rotations=case.rotations, backend=backend,
    )  # fmt: skip
    decoded = attention(case, REFERENCE).out
    allowed = TOLERANCE[dtype] * (1 if backend.name == "cpu" else 3)  # scores are rounded too
    assert mx.isfinite(prefilled).all() and error(prefilled, decoded) < allowed


def test_what_a_mask_leaves_out_counts_as_its_center(backend: Backend) -> None:
    """Keys as a model makes them: what a head does not keep of a stored key is its center's, exact
    rows keep everything, and a head that keeps none has exact rows only."""
    draw, dim, tokens = np.random.default_rng(4), 96, 64
    channels = Channels.of(
        np.stack([draw.permutation(dim) for _ in range(HEADS)]), np.array([3, 1, 0, 2])
    )
    space = replace(
        Space.of("hadamard", dim, dim, channels),
        equalizer=Equalizer(mx.array(draw.uniform(0.5, 2, (HEADS, dim)).astype(np.float32))),
    )
    k, v, exact_k, exact_v = (normal(draw, (HEADS, n, dim)) for n in (tokens, tokens, 9, 9))
    queries = normal(draw, (1, HEADS * 3, 2, dim))

    rotate_k, rotate_v = space.rotations
    body = Rows(rotate_k.apply(space.scaled(k)), rotate_v.apply(v))
    centers = Centers(*(x.mean(axis=1) for x in body))
    tiers = []
    for kept, heads in channels.holders():
        format = Format((8,) * kept + (0,) * (3 - kept), (8,) * 3)
        blocks = encode(body, centers, format, "search", backend)
        lengths = tokens * np.isin(np.arange(HEADS), heads)
        table = mx.arange(HEADS * 2, dtype=mx.int32).reshape(HEADS, 2)
        tiers.append(
            Tier(blocks.flatten(0, 1), table, mx.array(lengths.astype(np.int32)), format, False)
        )
    none = Rows(*(mx.zeros((HEADS, 0, dim)) for _ in "kv"))
    rows = append(none, Rows(space.scaled(exact_k), exact_v), space.rotations, backend)
    view = View(tiers, rows, centers, 4, space.rotations)
    found = decode_attention(space.queries(queries)[0], view, backend=backend, **ASKED).out

    center = space.undone(centers.k[:, None], centers.v[:, None])[0]
    order = np.array(channels.order)
    for head, kept in enumerate(channels.groups):
        dropped = order[head, 32 * kept :]
        stored = np.array(k[head])
        stored[:, dropped] = np.array(center[head])[:, dropped]
        both = [np.concatenate(x) if kept else x[1] for x in (
            (stored, np.array(exact_k[head])), (np.array(v[head]), np.array(exact_v[head])),
        )]  # fmt: skip
        mine = slice(3 * head, 3 * head + 3)
        weights = np.exp(0.125 * np.array(queries[0, mine]) @ both[0].T)
        wanted = (weights / weights.sum(-1, keepdims=True)) @ both[1]
        assert np.abs(np.array(found[mine]) - wanted).max() < 0.02  # 8-bit codes
