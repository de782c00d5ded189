"""Which rows of a matrix which backend sees, by default and with `-m slow`.

Every backend, and every instruction set of it that runs here, is a variant. The best instruction
set and the GPUs see all rows. The other sets share its loops, and the checker takes many times as
long: by default these see few rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from leankv_mlx.kernels import Backend
from tests.kernels import cases

Variant = tuple[str, str]


def few(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows, found greedily, in which every value of every factor occurs that occurs in any row, and
    every pair of values of the factors `names`."""

    def seen(row: Mapping[str, Any]) -> set[Any]:
        return {*row.items(), *itertools.combinations([(n, row[n]) for n in names], 2)}

    missing = {item for row in rows for item in seen(row)}
    kept = []
    while missing:
        best = max(rows, key=lambda row: len(seen(row) & missing))
        missing -= seen(best)
        kept.append(best)
    return kept


def matrix(
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    *,
    slow: Sequence[dict[str, Any]] = (),
    only: str = "",
) -> pytest.MarkDecorator:
    """Parameters `row` and `backend` (the fixture below) of a test.

    Args:
        rows: what every variant sees with `-m slow`, and the best by default.
        names: factors of which every variant sees all pairs of values, see `few`.
        slow: what no variant sees by default.
        only: an implementation, if the test is of no other.
    """
    variants = _variants(only)
    by_default = (
        {cases.identify(row) for row in rows},
        {cases.identify(x) for x in few(rows, names)},
    )
    best = {name: variant for name, variant in reversed(variants)}
    params = []
    for variant in variants or [None]:
        whole = variant is not None and variant[0] != "msl-check" and variant in best.items()
        for row in [*rows, *slow]:
            name = cases.identify(row)
            marks = _marks(variant)
            if name not in by_default[0 if whole else 1]:
                marks.append(pytest.mark.slow)
            params.append(pytest.param(row, variant, marks=marks, id=f"{_label(variant)}-{name}"))
    return pytest.mark.parametrize(("row", "backend"), params, indirect=["backend"])


def every(*, only: str = "", slow: str = "") -> list[Any]:
    """Parameters of a fixture `backend`: every variant, or those of one implementation. Those of
    the implementation `slow` are left out by default."""
    return [
        pytest.param(
            variant,
            marks=_marks(variant)
            + [pytest.mark.slow] * (variant is not None and variant[0] == slow),
            id=_label(variant),
        )
        for variant in _variants(only) or [None]
    ]


def chosen(variant: Variant | None) -> Iterator[Backend]:
    """The body of a fixture `backend`: the backend of its parameter; skips where there is none."""
    if variant is None:
        pytest.skip("only the reference backend runs here")
    name, which = variant
    with cases.IMPLEMENTATIONS[name][1](which) as backend:
        yield backend


def _variants(only: str) -> list[Variant]:
    return [v for v in cases.variants() if only in ("", v[0])]


def _label(variant: Variant | None) -> str:
    return "-".join(variant) if variant else "none"


def _marks(variant: Variant | None) -> list[pytest.MarkDecorator]:
    on_gpu = variant is not None and variant[0] in ("metal", "cuda")
    return [getattr(pytest.mark, variant[0])] if variant and on_gpu else []
