"""Operations on several sequences: what each of them gets alone, on the CPU bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.equalize import Equalizer
from leankv_mlx.codec.rotation import hadamard, rotation
from leankv_mlx.codec.space import Space
from leankv_mlx.errors import ConfigError, ShapeError
from leankv_mlx.kernels import Attention, Backend, Rows, Tier, View, resolve_backend
from leankv_mlx.kernels.append import append, append_batch
from leankv_mlx.kernels.decode_attention import decode_attention, decode_attention_batch
from tests.kernels import cases
from tests.kernels.cases import FIXED_POINT, TOLERANCE, Case, error
from tests.kernels.matrix import chosen, every, matrix

REFERENCE = resolve_backend("reference")
FACTORS: dict[str, Sequence[Any]] = {
    "sequences": (1, 2, 3, 5, 16),
    "pools": ("own", "shared"),
    "k_bits": (4, cases.MIXED),
    "v_bits": (3, 8),
    "dims": ((64, 64), (96, 128), (256, 64)),
    "group": (1, 3, 8),
    "new": (1, 2, 5, 8),
    "tiers": (0, 1, 2),
    "sink_logits": (False, True),
    "mask": (None, "causal"),
    "dtype": (mx.float32, mx.float16, mx.bfloat16),
    "rotated": (False, True),
    "skip": (0.0, 0.3),
}


@pytest.fixture(params=every())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from chosen(request.param)


def drawn(*, sequences: int, pools: str, tiers: int, skip: float = 0.0, **row: Any) -> list[Case]:
    """Sequences of different lengths; some have no tokens in a tier, and some no body at all. A
    view lists only tiers that hold anything."""
    kinds = ("partial", "full", "empty heads", "ragged")
    found = []
    for i in range(sequences):
        case = cases.case(
            **row, tiers=tiers, lengths=kinds[i % 4], exact=(40, 9, 103, 1)[i % 4] + i, skip=skip,
            blocks=1 + 5 * i % 12,
        )  # fmt: skip
        kept = [tier for t, tier in enumerate(case.tiers) if i % 5 < 3 or t == i % 5 - 3]
        found.append(
            replace(
                case, tiers=kept, sink_logits=found[0].sink_logits if found else case.sink_logits
            )
        )
    return shared(found) if pools == "shared" else found


def shared(found: list[Case]) -> list[Case]:
    """The same with one pool for each format."""
    pools: dict[Any, mx.array] = {}
    tiers: list[list[Tier]] = []
    for case in found:
        mine = []
        for tier in case.tiers:
            pool = pools.get(tier.format)
            first = 0 if pool is None else pool.shape[0]
            pools[tier.format] = tier.pool if pool is None else mx.concatenate([pool, tier.pool])
            mine.append(replace(tier, table=tier.table + first))
        tiers.append(mine)
    return [
        replace(case, tiers=[replace(tier, pool=pools[tier.format]) for tier in mine])
        for case, mine in zip(found, tiers, strict=True)
    ]


def together(found: list[Case], backend: Backend) -> Attention:
    first = found[0]
    result = decode_attention_batch(
        mx.stack([case.queries for case in found]), [case.view for case in found],
        scale=first.scale, mask=None if first.mask is None else "causal",
        sink_logits=first.sink_logits, backend=backend,
    )  # fmt: skip
    mx.eval(result)
    return result


def check(found: list[Case], backend: Backend) -> None:
    result = together(found, backend)
    for i, case in enumerate(found):
        alone = case.attend(decode_attention, backend=backend)
        same(backend, result.out[i], alone.out)
        same(backend, result.lse[i], alone.lse)


def same(backend: Backend, ours: mx.array, alone: mx.array) -> None:
    """A GPU splits the tokens of a row by what other rows there are."""
    if backend.name in ("cpu", "reference"):
        assert mx.array_equal(ours, alone)
    else:
        assert error(ours, alone) < TOLERANCE[ours.dtype]


@matrix(cases.pairwise(FACTORS), ("sequences", "tiers", "dtype"))
def test_each_sequence_gets_what_it_gets_alone(row: dict[str, Any], backend: Backend) -> None:
    check(drawn(**row), backend)


@matrix(cases.pairwise(FACTORS), ("sequences", "tiers", "dtype"))
def test_attention_of_a_batch(row: dict[str, Any], backend: Backend) -> None:
    found = drawn(**row | {"skip": 0.0})
    ours, wanted = together(found, backend), together(found, REFERENCE)
    dtype = found[0].queries.dtype
    products = FIXED_POINT.get(dtype, 0) if backend.name == "cpu" else 0
    allowed = TOLERANCE[dtype if row["rotated"] else mx.float32]
    for i in range(len(found)):
        assert error(ours.out[i], wanted.out[i]) < max(allowed, products)
        assert error(ours.lse[i], wanted.lse[i]) < 2e-5


def test_what_was_read_of_all(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"sequences": 4, "tiers": 1, "skip": 0.5, "group": 2}
    found = drawn(**row | {"new": 1})
    reads = [case.attend(decode_attention, backend=backend).reads for case in found]
    alone = sum(x.sum(0) for x in reads if x is not None)
    together_ = together(found, backend).reads
    assert together_ is not None and mx.array_equal(together_.sum(0), alone)


@pytest.mark.parametrize("backend", every(slow="msl-check"), indirect=True)  # has one thread
def test_long_sequences_share_the_threads(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"tiers": 1, "new": 1, "group": 3, "exact": 68, "skip": 0.0}
    row["sink_logits"] = False
    del row["sequences"], row["pools"]
    found = [
        cases.case(**row, lengths="partial", heads=2, blocks=blocks) for blocks in (200, 3, 90, 64)
    ]
    first = together(found, backend)
    check(found, backend)
    for _ in range(10):
        assert mx.array_equal(together(found, backend).out, first.out)


def test_queries_as_a_model_makes_them(backend: Backend) -> None:
    """By token, not by head: [B, L, Hq, D] seen as [B, Hq, L, D]."""
    row = cases.pairwise(FACTORS)[0] | {"sequences": 3, "new": 2, "group": 3, "tiers": 1}
    found = drawn(**row | {"rotated": True})
    queries = mx.stack([case.queries for case in found])
    seen = mx.contiguous(queries.swapaxes(1, 2)).swapaxes(1, 2)
    asked = {"scale": found[0].scale, "mask": None, "sink_logits": None, "backend": backend}
    views = [case.view for case in found]
    one, two = (decode_attention_batch(x, views, **asked) for x in (queries, seen))
    same(backend, one.out, two.out)


def scales_of(draw: np.random.Generator, n: int, dim: int) -> list[mx.array | None]:
    """Of each sequence, the second has none."""
    every = [mx.array(draw.uniform(0.01, 30, (3, dim)).astype(np.float32)) for _ in range(n)]
    return [None if i == 1 else x for i, x in enumerate(every)]


@pytest.mark.parametrize("name", ["hadamard", "none"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_scaled_queries_are_those_of_an_equalizer(
    dtype: mx.Dtype, name: Any, backend: Backend
) -> None:
    row = cases.pairwise(FACTORS)[0] | {"sequences": 3, "new": 2, "group": 3, "tiers": 1}
    row |= {"dtype": dtype, "rotated": True, "sink_logits": False, "mask": None, "skip": 0.0}
    found = drawn(**row | {"dims": (64, 64)})
    rotations = rotation(name, 57), rotation(name, 64)
    found = [replace(case, rotations=rotations) for case in found]
    scales = scales_of(np.random.default_rng(1), 3, 57)
    asked = {"scale": 0.1, "mask": None, "sink_logits": None, "backend": backend}
    queries = mx.stack([case.queries for case in found])
    both = decode_attention_batch(queries, [case.view for case in found], scales=scales, **asked)
    for i, (case, own) in enumerate(zip(found, scales, strict=True)):
        scaled = case.queries if own is None else Equalizer(own).queries(case.queries[None])[0]
        alone = decode_attention(scaled, case.view, **asked)
        same(backend, both.out[i], alone.out)
        same(backend, both.lse[i], alone.lse)


@pytest.mark.parametrize("name", ["hadamard", "none"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("new", [1, 3, 8])
def test_rows_are_appended_as_they_are_alone(
    new: int, dtype: mx.Dtype, name: Any, backend: Backend
) -> None:
    draw, dims = np.random.default_rng(new), (57, 128)
    rotations = rotation(name, dims[0]), rotation(name, dims[1])
    for lengths in ([0], [40, 0, 1, 103], [300] * 3):
        exact = [
            Rows(*(cases.normal(draw, (3, n, r.dim)).astype(dtype) for r in rotations))
            for n in lengths
        ]
        rows = Rows(*(cases.normal(draw, (len(lengths), 3, new, d)).astype(dtype) for d in dims))
        scales = scales_of(draw, len(lengths), dims[0])
        found = append_batch(exact, rows, rotations, backend, scales)
        for i, (old, both, own) in enumerate(zip(exact, found, scales, strict=True)):
            space = Space(rotations, None if own is None else Equalizer(own))
            alone = append(old, Rows(space.scaled(rows.k[i]), rows.v[i]), rotations, backend)
            assert all(map(mx.array_equal, both, alone))
            assert [x.dtype for x in both] == [dtype] * 2


def test_what_does_not_fit(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"sequences": 2, "new": 1, "tiers": 1, "skip": 0.0}
    found = drawn(**row | {"dims": (64, 64), "rotated": True, "group": 2})
    queries = mx.stack([case.queries for case in found])
    views = [case.view for case in found]

    def attend(queries: mx.array, views: list[View]) -> Attention:
        return decode_attention_batch(
            queries, views, scale=1.0, mask=None, sink_logits=None, backend=backend
        )

    for wrong in (queries[0], queries[:1], queries[..., :-1], mx.repeat(queries, 9, axis=2)):
        with pytest.raises(ShapeError):
            attend(wrong, views)
    with pytest.raises(ShapeError):
        attend(queries[:0], [])
    other = replace(views[1], rotations=None)
    narrow = replace(views[1], exact=Rows(*(x[:2] for x in views[1].exact)))
    for view in (other, narrow):
        with pytest.raises(ShapeError, match="one model"):
            attend(queries, [views[0], view])
    with pytest.raises(ShapeError, match="cannot be scaled"):
        decode_attention_batch(
            mx.zeros((1, *queries.shape[1:3], 64)), [other], scale=1.0, mask=None,
            sink_logits=None, backend=backend, scales=[mx.ones((3, 64))],
        )  # fmt: skip
    with pytest.raises(ConfigError):
        attend(queries, [views[0], replace(views[1], skip=1.5)])
    turned = hadamard(64), hadamard(64)
    exact = [view.exact for view in views]
    fits = mx.zeros((2, 3, 1, 64))
    for rows in (fits[0], fits[:1], fits[..., :32], mx.zeros((2, 2, 1, 64))):
        with pytest.raises(ShapeError):
            append_batch(exact, Rows(rows, rows), turned, backend)
    for scales in ([None], [None, mx.ones((2, 64))], [mx.ones((3, 64), mx.float16), None]):
        with pytest.raises(ShapeError):
            append_batch(exact, Rows(fits, fits), turned, backend, scales)
        with pytest.raises(ShapeError):
            decode_attention_batch(
                queries, views, scale=1.0, mask=None, sink_logits=None, backend=backend,
                scales=scales,
            )  # fmt: skip
    with pytest.raises(ShapeError):
        append_batch([], Rows(fits[:0], fits[:0]), turned, backend)
