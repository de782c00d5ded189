"""Every backend, and every instruction set of it that runs here, against the reference.

A new backend is a row of `IMPLEMENTATIONS` in cases.py and nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.format import Format
from leankv_mlx.errors import ConfigError
from leankv_mlx.kernels import Attention, Backend, Centers, Rows, Tier, resolve_backend
from leankv_mlx.kernels.decode_attention import decode_attention
from leankv_mlx.kernels.dequantize import dequantize
from leankv_mlx.kernels.encode import encode
from leankv_mlx.kernels.gather import gather
from tests.kernels import cases
from tests.kernels.cases import FACTORS, FIXED_POINT, TOLERANCE, Case, error
from tests.kernels.matrix import chosen, every, matrix

REFERENCE = resolve_backend("reference")


@pytest.fixture(params=every())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from chosen(request.param)


def attention(case: Case, backend: Backend) -> Attention:
    result = case.attend(decode_attention, backend=backend)
    mx.eval(result)
    return result


def near(case: Case, factor: float) -> Attention:
    return attention(replace(case, skip=case.skip * factor), REFERENCE)


def either(ours: mx.array, wanted: list[mx.array]) -> mx.array:
    """Of each query row the closest: a weight that rounding moves over `skip` decides a block."""
    far = mx.stack([mx.abs(ours - x).astype(mx.float32).max(axis=-1) for x in wanted])
    chosen = mx.argmin(far, axis=0)[..., None]
    return sum(mx.where(chosen == i, x, mx.zeros_like(x)) for i, x in enumerate(wanted))


def check_attention(case: Case, backend: Backend) -> None:
    ours, reference = attention(case, backend), attention(case, REFERENCE)
    if case.rotations:
        allowed = TOLERANCE[case.queries.dtype]
    else:  # the output is not rounded
        products = FIXED_POINT if backend.name == "cpu" else {}
        allowed = products.get(case.queries.dtype, TOLERANCE[mx.float32])
    wanted = reference.out
    if case.skip and case.queries.dtype != mx.float32 and backend.name == "cpu":
        wanted = either(ours.out, [wanted, *(near(case, f).out for f in (0.999, 1.001))])
    assert error(ours.out, wanted) < allowed
    assert error(ours.lse, reference.lse) < 2e-5
    assert (ours.reads is None) == (reference.reads is None)
    if ours.reads is not None and reference.reads is not None:
        _, length, _ = case.queries.shape
        if case.queries.shape[0] // case.exact.k.shape[0] * length <= 8:  # in one turn everywhere
            assert mx.array_equal(ours.reads.sum(0), reference.reads.sum(0))


@matrix(cases.pairwise(FACTORS), ("k_bits", "v_bits", "dtype"), slow=cases.full(FACTORS))
def test_decode_attention(row: dict[str, Any], backend: Backend) -> None:
    check_attention(cases.case(**row), backend)


@pytest.mark.parametrize("rows", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("tiers", [0, 1, 2])
def test_exact_rows_of_16_bits_with_float32_queries(
    tiers: int, rows: mx.Dtype, backend: Backend
) -> None:
    """What a model that computes in float32 but whose weights had 16 bits asks for."""
    row = cases.pairwise(FACTORS)[0] | {"tiers": tiers, "exact": 68, "new": 3, "mask": "causal"}
    row |= {"dtype": mx.float32, "rotated": True, "group": 3, "lengths": "full", "skip": 0.0}
    case = cases.case(**row)
    halves = Rows(*(x.astype(rows) for x in case.exact))
    check_attention(replace(case, exact=halves), backend)
    for rotations in (None, case.rotations):
        pair = (
            gather(replace(case, exact=halves, rotations=rotations).view, mx.float32, b)
            for b in (backend, REFERENCE)
        )  # fmt: skip
        for ours, reference in zip(*pair, strict=True):
            assert ours.dtype == mx.float32
            assert error(ours, reference) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("heads", [1, 5])
def test_decode_attention_split_over_threads(heads: int, backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"tiers": 2, "lengths": "partial", "new": 2, "exact": 103}
    check_attention(cases.case(**row, heads=heads, blocks=130), backend)


def test_one_head_has_more_query_rows_than_any_other_test(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"group": 71, "new": 8, "exact": 40, "tiers": 1}
    check_attention(cases.case(**row, heads=1), backend)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_has_no_output(
    value: float, dtype: mx.Dtype, backend: Backend
) -> None:
    row = cases.pairwise(FACTORS)[0] | {"tiers": 1, "lengths": "full", "skip": 0.0}
    case = cases.case(**row | {"group": 2, "new": 1, "exact": 4, "dtype": dtype})
    wrong = mx.zeros(case.queries.shape)
    wrong[1, 0, 5] = value
    result = attention(replace(case, queries=(case.queries + wrong).astype(dtype)), backend)
    for x in (result.out, result.lse[..., None]):
        finite = mx.isfinite(x).all(axis=(1, 2)).tolist()
        assert finite == [head != 1 for head in range(x.shape[0])]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 30])
def test_queries_of_any_size(scale: float, dtype: mx.Dtype, backend: Backend) -> None:
    """One channel is much larger than all others."""
    row = cases.pairwise(FACTORS)[0] | {"tiers": 1, "lengths": "partial", "skip": 0.0}
    case = cases.case(**row | {"group": 2, "new": 2, "exact": 40, "dtype": dtype})
    queries = case.queries.astype(mx.float32) * mx.array([scale] + [scale / 50] * 63)
    check_attention(replace(case, queries=queries.astype(dtype)), backend)


@pytest.mark.parametrize("query", [0.1, -0.1, 0.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_sums_of_products(bits: int, query: float, backend: Backend) -> None:
    """All codes are the largest, all channels of the queries alike, and so are the weights."""
    row = cases.pairwise(FACTORS)[0] | {"k_bits": bits, "v_bits": bits, "tiers": 1, "exact": 0}
    row |= {"lengths": "full", "mask": None, "sink_logits": False, "rotated": False, "skip": 0.0}
    case = cases.case(**row | {"dtype": mx.bfloat16})
    words = np.array(case.tiers[0].pool)
    words[:, :-32] = 2**32 - 1
    tiers = [replace(case.tiers[0], pool=mx.array(words))]
    queries = mx.full(case.queries.shape, query, mx.bfloat16)
    check_attention(replace(case, tiers=tiers, queries=queries), backend)


@pytest.mark.parametrize("lengths", [[64, 0, 0], [0, 64, 0], [0, 0, 0]])
def test_a_head_without_tokens_attends_to_its_sink_logits(
    lengths: list[int], backend: Backend
) -> None:
    row = cases.pairwise(FACTORS)[0] | {"tiers": 1, "lengths": "full", "exact": 4, "new": 1}
    case = cases.case(**row | {"sink_logits": True, "mask": None, "skip": 0.0})
    none = Rows(*(x[:, :0] for x in case.exact))
    tiers = [replace(case.tiers[0], lengths=mx.array(lengths, mx.int32))]
    result = attention(replace(case, exact=none, tiers=tiers, sinks=0), backend)
    group = case.queries.shape[0] // 3
    for head, length in enumerate(lengths):
        mine = slice(head * group, (head + 1) * group)
        assert mx.isfinite(result.out[mine]).all() and mx.isfinite(result.lse[mine]).all()
        assert bool(mx.any(result.out[mine] != 0)) == (length > 0)


@pytest.mark.parametrize("backend", every(slow="msl-check"), indirect=True)  # has one thread
def test_who_is_faster_does_not_change_a_bit(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"tiers": 1, "lengths": "partial", "new": 1, "exact": 40}
    case = cases.case(**row, heads=2, blocks=130)
    first = attention(case, backend)
    for _ in range(20):
        assert mx.array_equal(attention(case, backend).out, first.out)


def test_an_array_as_mask(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"tiers": 1, "lengths": "full", "exact": 40, "new": 3}
    case = cases.case(**row)
    mask = mx.arange(128 + 40) % 3 > 0
    check_attention(replace(case, mask=mx.broadcast_to(mask, (3, 168))), backend)


def test_skipping_where_attention_is_peaked(backend: Backend) -> None:
    row = cases.pairwise(FACTORS)[0] | {"group": 2, "new": 3, "mask": "causal", "tiers": 2}
    case = cases.case(**row | {"exact": 40, "lengths": "partial", "skip": 0.6}, blocks=20)
    case = replace(case, queries=case.queries * 4)
    check_attention(case, backend)
    reads = attention(case, backend).reads
    assert reads is not None
    read, blocks = reads.sum(0).tolist()
    assert 0 < read < blocks == sum(-(-n // 32) for b in case.tiers for n in b.lengths.tolist())


@pytest.mark.parametrize("skip", [0.05, 0.2])
def test_no_token_of_the_weight_is_left_out(skip: float, backend: Backend) -> None:
    """All values of block b are one vector, so the output tells which blocks counted."""
    draw, blocks = np.random.default_rng(1), 32
    keys = cases.normal(draw, (1, blocks * 32, 32))
    values = mx.repeat(mx.eye(blocks)[None], 32, axis=1)
    centers, format = Centers(mx.zeros((1, 32)), mx.zeros((1, 32))), Format((8,), (8,))
    pool = encode(Rows(keys, values), centers, format, "search", REFERENCE)[0]
    table = mx.arange(blocks, dtype=mx.int32)[None]
    body = Tier(pool, table, mx.array([blocks * 32], mx.int32), format, True)
    queries = 2 * cases.normal(draw, (6, 1, 32))
    rows = Rows(queries.swapaxes(0, 1) * 0.2, mx.zeros((1, 6, 32)))
    result = attention(
        Case(queries, [body], rows, centers, 0.5, 0, None, None, None, skip), backend
    )

    k, v = (np.array(x[0], float) for x in dequantize(body, centers, mx.float32, REFERENCE))
    q = 0.5 * np.array(queries[:, 0], float)
    weights = np.exp(q @ k.T).reshape(6, blocks, 32)
    others = np.exp(q @ np.array(rows.k[0], float).T).sum(1)
    total = weights.sum((1, 2)) + others
    shares = np.linalg.solve(v[::32].T, np.array(result.out[:, 0], float).T).T
    counted = shares * total[:, None] / weights.sum(-1)
    assert np.abs(counted - counted.round()).max() < 0.01
    assert counted[weights.max(-1) / total[:, None] >= skip].min() > 0.99
    assert (counted.round() == (weights.max(-1) / others[:, None] >= skip)).all()
    assert 0.1 < counted.mean() < 0.9
    assert np.allclose(np.array(result.lse[:, 0]), np.log(total), atol=1e-4)
    assert result.reads is not None
    assert result.reads.sum(0).tolist() == [counted.round().any(0).sum(), blocks]


def test_where_every_token_weighs_alike_nothing_is_skipped(backend: Backend) -> None:
    case = cases.case(
        **cases.pairwise(FACTORS)[0] | {"group": 2, "new": 1, "tiers": 1, "exact": 40}
    )
    flat = replace(case, queries=case.queries * 1e-3, skip=1e-3)
    ours, full = attention(flat, backend), attention(replace(flat, skip=0.0), backend)
    assert error(ours.out, full.out) < TOLERANCE[case.queries.dtype]
    assert full.reads is None and ours.reads is not None
    read, blocks = ours.reads.sum(0).tolist()
    assert read == blocks > 0


def test_without_a_body_there_is_nothing_to_skip(backend: Backend) -> None:
    case = cases.case(**cases.pairwise(FACTORS)[0] | {"tiers": 0, "skip": 0.1})
    assert attention(case, backend).reads is None


@pytest.mark.parametrize("skip", [-0.1, 1.0, float("nan")])
def test_a_skip_that_is_no_weight(skip: float) -> None:
    case = cases.case(**cases.pairwise(FACTORS)[0] | {"skip": skip})
    with pytest.raises(ConfigError, match="no attention weight"):
        attention(case, REFERENCE)


@pytest.mark.parametrize("backend", every(slow="msl-check"), indirect=True)  # takes 30 seconds
def test_512_steps_do_not_drift(backend: Backend) -> None:
    """Fused attention stays what attention over the decoded arrays is."""
    from leankv_mlx.cache import CompressedKVCache, owner_of

    cache = CompressedKVCache("leankv:backend=reference")
    cache._backend = backend  # msl-check has no name that a user could give
    draw, errors = np.random.default_rng(7), []
    for _ in range(512):
        q, k, v = (cases.normal(draw, (1, heads, 1, 64)) for heads in (4, 2, 2))
        keys, values = cache.update_and_fetch(k, v)
        owner = owner_of(keys, values)
        assert owner is not None
        fused = owner.attend(q, scale=0.125, mask=None)
        plain = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.125)
        errors.append(error(fused, plain))
    assert max(errors) < 2e-5
    assert max(errors[-64:]) < 4 * max(errors[:64]) + 1e-6
