"""Every implementation, and every instruction set of it that runs here, against the reference.

A new one is a row of `IMPLEMENTATIONS` in cases.py and nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.errors import BackendUnavailableError, ShapeError
from leankv_mlx.projections import Backend, Keep, Norm, project, relay, resolve_backend
from tests.kernels.cases import identify, pairwise
from tests.projections import cases
from tests.projections.cases import FACTORS, TOLERANCE, case, weight

REFERENCE = resolve_backend("reference")


@pytest.fixture(params=cases.variants() or [None], ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param is None:
        pytest.skip("only the reference runs here")
    name, variant = request.param
    with cases.IMPLEMENTATIONS[name][1](variant) as found:
        yield found


def far(a: mx.array, b: mx.array) -> float:
    """Largest difference in units of the largest value of b."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if not b.size:
        return 0.0
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-30))


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=identify)
def test_parity(row: dict[str, Any], backend: Backend) -> None:
    asked = case(**row)
    ours, wanted = project(**asked, backend=backend), project(**asked, backend=REFERENCE)
    for out, expected in zip(ours.outs, wanted.outs, strict=True):
        assert far(out, expected) <= TOLERANCE[row["dtype"]]
    assert (ours.read is None) == (wanted.read is None) == (row["keep"] is None)
    if ours.read is not None and wanted.read is not None:
        # With a norm, rounding may move a channel over the threshold.
        assert abs(ours.read.item() - wanted.read.item()) <= (2 if row["norm"] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_parity_of_more(seed: int, backend: Backend) -> None:
    for row in pairwise(FACTORS, seed):
        test_parity(row, backend)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 513, 1025])
def test_numbers_are_those_of_mlx(rows: int, backend: Backend) -> None:
    values = mx.random.normal((200, 192))
    given = mx.quantize(values, 64, 4)
    x = mx.random.normal((rows, 192))
    expected = np.array(x, np.float64) @ np.array(mx.dequantize(*given, 64, 4), np.float64).T
    (out,) = project(x, [relay(*given, 64, 4)], backend=backend).outs
    assert np.abs(np.array(out) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("bits", FACTORS["bits"])
def test_a_row_of_a_batch_gets_the_bits_that_it_gets_alone(bits: int, backend: Backend) -> None:
    """Of up to 32 sequences, so that what one answers does not depend on the others."""
    if backend.name != "cpu":
        pytest.skip("a GPU's kernel for one to eight rows is another one than that for more")
    weights = [weight(n, 320, 64, bits, mx.float16) for n in (300, 300)]
    x, residual = mx.random.normal((32, 320)), mx.random.normal((32, 300))
    norm = Norm(mx.random.normal((320,)), 1e-5)

    def out(first: int, last: int) -> mx.array:
        rows = slice(first, last)
        asked = {"norm": norm, "residual": residual[rows], "gate": "silu", "backend": backend}
        return project(x[rows], weights, **asked).outs[0]

    wanted = mx.concatenate([out(row, row + 1) for row in range(32)])
    for rows in (2, 3, 5, 8, 9, 16, 31, 32):
        assert mx.array_equal(out(0, rows), wanted[:rows])


def test_a_channel_that_is_left_out_is_not_looked_at(backend: Backend) -> None:
    """Groups without any channel have scales that would show in the output."""
    given = weight(300, 256, 32, 4, mx.float32)
    x = mx.zeros((1, 256))
    x[0, 70] = 2.0
    spoiled = mx.where(mx.arange(8)[None, :, None] == 2, given.scales, float("nan"))
    hidden = type(given)(given.codes, spoiled, given.biases, 300, 4, 32)
    (out,), read = project(x, [hidden], keep=Keep(1.0), backend=backend)
    (whole,), _ = project(x, [given], backend=REFERENCE)
    assert read is not None and read.item() == 1
    assert far(out, whole) <= 1e-5


@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_no_number_is_never_left_out(rows: int, backend: Backend) -> None:
    given = weight(20, 64, 32, 4, mx.float32)
    x = mx.full((rows, 64), 0.1)
    x[0, 5] = float("nan")
    for chosen in (backend, REFERENCE):
        (out,), read = project(x, [given], keep=Keep(1.0), backend=chosen)
        assert mx.isnan(out[0]).all() and read is not None and read.item() == 1


def test_what_does_not_fit_is_refused() -> None:
    one, other = weight(20, 64, 32, 4, mx.float32), weight(21, 64, 32, 4, mx.float32)
    x = mx.zeros((2, 64))
    wrong: list[tuple[mx.array, dict[str, Any]]] = [
        (mx.zeros((2, 32)), {"weights": [one]}),
        (mx.zeros((2, 64), mx.int32), {"weights": [one]}),
        (mx.array(1.0), {"weights": [one]}),
        (x, {"weights": []}),
        (x, {"weights": [one, other], "gate": "silu"}),
        (x, {"weights": [one], "gate": "silu"}),
        (x, {"weights": [one], "biases": [mx.zeros((21,))]}),
        (x, {"weights": [one], "biases": []}),
        (x, {"weights": [one], "biases": [None, None]}),
        (x, {"weights": [one], "residual": mx.zeros((1, 20))}),
        (x, {"weights": [one, other], "residual": mx.zeros((2, 20))}),
        (x, {"weights": [one], "norm": Norm(mx.zeros((32,)), 1e-5)}),
        (x, {"weights": [one], "keep": Keep(0.1, mx.zeros((32,)))}),
        (x, {"weights": [one], "keep": Keep(-0.1)}),
        (x, {"weights": [one], "residual": mx.zeros((2, 20), mx.int32)}),
        (x, {"weights": [one], "norm": Norm(mx.zeros((64,), mx.int32), 1e-5)}),
    ]
    for inputs, asked in wrong:
        with pytest.raises(ShapeError, match=r"\[project\]"):
            project(inputs, **asked)
    with pytest.raises(BackendUnavailableError, match="unknown backend 'tpu'"):
        resolve_backend("tpu")
