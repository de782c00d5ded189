"""Attention of many new tokens: every backend that has a kernel for it against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.errors import ShapeError, UnsupportedError
from leankv_mlx.kernels import Backend, PrefillInputs, Rows, resolve_backend
from leankv_mlx.kernels.prefill_attention import prefill_attention
from tests.kernels import cases
from tests.kernels.cases import PREFILL_FACTORS, TOLERANCE, error
from tests.kernels.matrix import chosen, every, matrix

REFERENCE = resolve_backend("reference")
MATRIX = cases.pairwise(PREFILL_FACTORS)
MATRIX += [row | {"group": 2, "new": 600, "earlier": 1400} for row in MATRIX[:4]]
ROW = MATRIX[0] | {"dims": (64, 96), "new": 100, "earlier": 200, "dtype": mx.float32}


@pytest.fixture(params=every(only="cpu"))  # the others are the reference
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from chosen(request.param)


def attention(case: PrefillInputs, backend: Backend) -> mx.array:
    out = prefill_attention(**vars(case), backend=backend)
    mx.eval(out)
    return out


def expected(case: PrefillInputs) -> mx.array:
    """In float32: in half precision MLX rounds the scores too, which is more than we allow."""
    rows = Rows(*(x.astype(mx.float32) for x in case.rows))
    whole = replace(case, queries=case.queries.astype(mx.float32), rows=rows)
    return attention(whole, REFERENCE).astype(case.queries.dtype)


@matrix(MATRIX, ("dims", "dtype"), only="cpu")
def test_prefill_attention(row: dict[str, Any], backend: Backend) -> None:
    case = cases.prefill_case(**row)
    wanted = expected(case)
    assert error(attention(case, backend), wanted) < TOLERANCE[case.queries.dtype]


def test_few_rows_of_many_heads_and_many_rows_of_one(backend: Backend) -> None:
    for change in ({"heads": 9, "new": 9, "group": 3}, {"heads": 1, "new": 100, "group": 71}):
        case = cases.prefill_case(**ROW | change)
        assert error(attention(case, backend), expected(case)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_are_far_apart(order: int, backend: Backend) -> None:
    """The maximum rises with every tile of keys, or is in the first one."""
    case = cases.prefill_case(**ROW | {"tokens": "all", "mask": None, "rotation": "none"})
    rising = mx.arange(300, dtype=mx.float32)[::order, None] * 0.01
    rows = Rows(mx.broadcast_to(rising, case.rows.k.shape), case.rows.v)
    case = replace(case, rows=rows, queries=mx.abs(case.queries))
    assert error(attention(case, backend), expected(case)) < TOLERANCE[mx.float32]


def test_more_queries_than_tokens(backend: Backend) -> None:
    case = cases.prefill_case(**ROW | {"tokens": "all", "mask": None, "earlier": 0})
    case = replace(case, rows=Rows(*(x[:, :7] for x in case.rows)))
    assert error(attention(case, backend), expected(case)) < TOLERANCE[mx.float32]


def test_arrays_that_are_not_in_row_order(backend: Backend) -> None:
    case = cases.prefill_case(**ROW | {"tokens": "ragged"})
    assert case.present is not None
    strided = replace(
        case,
        queries=mx.contiguous(case.queries.swapaxes(0, 1)).swapaxes(0, 1),
        rows=Rows(*(mx.pad(x, [(0, 0), (3, 5), (0, 0)])[:, 3:-5] for x in case.rows)),
        present=mx.contiguous(case.present.T).T,
    )
    assert mx.array_equal(attention(strided, backend), attention(case, backend))


@pytest.mark.parametrize("additive", [False, True])
def test_an_array_as_mask(additive: bool, backend: Backend) -> None:
    case = cases.prefill_case(**ROW | {"tokens": "all"})
    seen = mx.broadcast_to(mx.arange(300) % 3 > 0, (100, 300))
    case = replace(case, mask=mx.where(seen, 0.0, -1e9) if additive else seen)
    kept = mx.array(np.flatnonzero(np.arange(300) % 3))
    only = Rows(*(x[:, kept] for x in case.rows))
    wanted = attention(replace(case, rows=only, mask=None), REFERENCE)
    assert error(attention(case, backend), wanted) < TOLERANCE[mx.float32]


def test_what_does_not_fit(backend: Backend) -> None:
    case = cases.prefill_case(**ROW | {"tokens": "ragged", "mask": "causal"})
    wrong: list[dict[str, Any]] = [
        {"queries": case.queries[..., :-1]},
        {"queries": case.queries[:1]},
        {"rows": Rows(*(x[:, -99:] for x in case.rows))},
        {"rows": Rows(case.rows.k, case.rows.v[:, 1:])},
        {"present": mx.ones((2, 299), mx.bool_)},
    ]
    for change in wrong:
        with pytest.raises(ShapeError):
            attention(replace(case, **change), backend)
    with pytest.raises(UnsupportedError, match="keep_all"):
        attention(replace(case, mask=mx.ones((100, 300), mx.bool_)), backend)
