"""The products on a GPU beside the reference: on a device where one is, and under the checker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.gpu import Kernel
from leankv_mlx.kernels.gpu.launch import CUBIC, SHUFFLE
from leankv_mlx.kernels.gpu.project import spread
from leankv_mlx.projections import Backend, Keep, Norm, Weight, project, relay, resolve_backend
from leankv_mlx.projections.gpu import GpuProject, check
from tests.kernels import cases
from tests.kernels.matrix import few
from tests.msl import compiler
from tests.msl.dispatch import Run
from tests.msl.launcher import MslLauncher, ReportError

FACTORS: Mapping[str, Sequence[Any]] = {
    "bits": (2, 3, 4, 5, 6, 8),
    "group": (32, 64, 128),
    "shape": ((8, 128), (72, 384), (130, 256), (300, 640)),
    "rows": (1, 2, 3, 5, 8),
    "weights": (1, 2, 3, "gated"),
    "keep": (None, "none", "some", "all", "some by norms"),
    "norm": (False, True),
    "bias": (False, True),
    "residual": (False, True),
    "gate": ("silu", "gelu", "gelu_approx"),
    "dtype": (mx.float32, mx.float16, mx.bfloat16),
    "scales": (mx.float32, mx.float16, mx.bfloat16),
}
ROWS = cases.pairwise(FACTORS)
DEFAULT = [cases.identify(row) for row in few(ROWS, ())]
checked = pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")


def arguments(row: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What `project` is called with; the same row always gives the same."""
    draw = np.random.default_rng(ROWS.index(dict(row)) if row in ROWS else 0)
    outputs, inputs = row["shape"]
    gated = row["weights"] == "gated"
    sizes = [outputs] * 2 if gated else [outputs + 40 * i for i in range(row["weights"])]
    weights = [weight(draw, size, inputs, row) for size in sizes]
    x = cases.normal(draw, (row["rows"], inputs)).astype(row["dtype"])
    norm = Norm(1 + 0.2 * cases.normal(draw, (inputs,)).astype(row["dtype"]), 1e-5)
    more: dict[str, Any] = {"norm": norm if row["norm"] else None}
    if row["keep"]:
        more["keep"] = keep(draw, row["keep"], x, more["norm"])
    if row["bias"]:
        more["biases"] = [cases.normal(draw, (size,)).astype(row["scales"]) for size in sizes]
        more["biases"][-1] = None if len(sizes) == 3 else more["biases"][-1]
    if row["residual"] and len(sizes) - gated == 1:
        more["residual"] = cases.normal(draw, (row["rows"], outputs)).astype(row["dtype"])
    if gated:
        more["gate"] = row["gate"]
    return [x, weights], more


def weight(draw: np.random.Generator, outputs: int, inputs: int, row: Mapping[str, Any]) -> Weight:
    given = mx.quantize(cases.normal(draw, (outputs, inputs)) / 8, row["group"], row["bits"])
    codes, scales, zeros = given
    sides = (side.astype(row["scales"]) for side in (scales, zeros))
    return relay(codes, *sides, row["group"], row["bits"])


def keep(draw: np.random.Generator, which: str, x: mx.array, norm: Norm | None) -> Keep:
    """ "some" has a threshold that no size is near: rounding must not decide."""
    norms = mx.array(draw.uniform(0.5, 2, x.shape[1]), mx.float32) if "norms" in which else None
    if which == "none":
        return Keep(1e9)
    if which == "all":
        return Keep(0.0)
    wide = x.astype(mx.float32)
    if norm is not None:
        wide = mx.fast.rms_norm(wide, norm.weight.astype(mx.float32), norm.eps)
    sizes = np.sort(np.array(mx.abs(wide) * (1 if norms is None else norms)).ravel())
    middle = sizes[len(sizes) // 3 : len(sizes) // 3 + 40]
    at = int(np.argmax(np.diff(middle)))
    return Keep(float(middle[at] + middle[at + 1]) / 2, norms)


REFERENCE = resolve_backend("reference")


def gpu(launch: Any) -> Backend:
    return Backend("gpu", GpuProject(launch))


def compare(backend: Backend, row: Mapping[str, Any]) -> None:
    given, more = arguments(row)
    ours, reference = (project(*given, **more, backend=b) for b in (backend, REFERENCE))
    assert len(ours.outs) == len(reference.outs)
    for a, b in zip(ours.outs, reference.outs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == row["dtype"]
        limit = 1e-5 if row["dtype"] == mx.float32 else cases.TOLERANCE[row["dtype"]]
        assert cases.error(a, b) < limit
    assert (ours.read is None) == (reference.read is None)
    if ours.read is not None and reference.read is not None:
        assert ours.read.shape == () and ours.read.item() == reference.read.item()


def params() -> list[Any]:
    names = [cases.identify(row) for row in ROWS]
    return [
        pytest.param(row, id=name, marks=[] if name in DEFAULT else pytest.mark.slow)
        for row, name in zip(ROWS, names, strict=True)
    ]


def launcher(row: Mapping[str, Any]) -> MslLauncher:
    """Rows differ in the strategy and in the order of threads, and always repeat themselves."""
    number = ROWS.index(dict(row)) if row in ROWS else 0
    run = Run(order=number // 4 % 3, seed=number, jitter=number % 5)
    return MslLauncher((CUBIC, SHUFFLE)[number // 2 % 2], run)


@checked
@pytest.mark.parametrize("row", params())
def test_the_kernels_are_right_and_clean(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other row has the strips of a large weight."""
    if ROWS.index(row) % 2:
        monkeypatch.setattr("leankv_mlx.kernels.gpu.project._FEW_STRIPS", 0)
    compare(gpu(launcher(row)), row)


@pytest.mark.parametrize("row", ROWS, ids=cases.identify)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=getattr(pytest.mark, n)) for n in ("metal", "cuda")]
)
def test_on_its_device_it_is_right(name: str, row: dict[str, Any]) -> None:
    compare(on_device(name), row)


def on_device(name: str) -> Backend:
    try:
        return resolve_backend(name)
    except BackendUnavailableError as error:
        pytest.skip(f"{name}: {error}")


PLAIN = {
    "bits": 4, "group": 64, "shape": (130, 256), "rows": 1, "weights": 1, "keep": None,
    "norm": False, "bias": False, "residual": False, "gate": "silu", "dtype": mx.float32,
    "scales": mx.float16,
}  # fmt: skip


@checked
@pytest.mark.parametrize("bits", FACTORS["bits"])
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
def test_many_rows_are_multiplied_by_numbers(bits: int, dtype: mx.Dtype) -> None:
    more = {"norm": True, "bias": True, "keep": "some", "weights": "gated", "residual": True}
    row = PLAIN | more | {"rows": 33, "bits": bits, "dtype": dtype, "scales": dtype}
    if dtype != mx.float32:
        row["keep"] = None  # near a threshold 16 bits may decide otherwise
    given, arguments_ = arguments(row)
    ours, reference = (
        project(*given, **arguments_, backend=b) for b in (gpu(MslLauncher()), REFERENCE)
    )
    limit = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}[dtype]  # 16-bit weights
    assert cases.error(ours.outs[0], reference.outs[0]) < limit


@checked
def test_rows_that_do_not_fill_their_threadgroups() -> None:
    """Several threadgroups share the rows, and threads of one have no output left."""
    for bits, rows in ((3, 8), (2, 5), (5, 7)):
        compare(gpu(MslLauncher()), PLAIN | {"bits": bits, "rows": rows, "shape": (300, 640)})


@checked
def test_leading_axes_stay() -> None:
    given, more = arguments(PLAIN | {"rows": 4, "residual": True})
    x, residual = given[0].reshape(2, 1, 2, -1), more["residual"].reshape(2, 1, 2, -1)
    (out,) = project(x, given[1], residual=residual, backend=gpu(MslLauncher())).outs
    assert out.shape == (2, 1, 2, 130)
    expected = project(*given, **more, backend=REFERENCE).outs[0]
    assert cases.error(out.reshape(expected.shape), expected) < 1e-5


class Counting(MslLauncher):
    """Notes which kernels run."""

    def __call__(self, kernel: Kernel, *call: Any) -> list[mx.array]:
        names.append(kernel.name)
        return super().__call__(kernel, *call)


names: list[str] = []


@checked
def test_weights_of_one_kind_are_one_launch_and_others_one_each() -> None:
    draw = np.random.default_rng(0)
    x = cases.normal(draw, (1, 128))
    alike, other = PLAIN, PLAIN | {"bits": 8}
    for kinds, launches in (((alike,) * 3, 1), ((alike, other, alike), 3), ((alike,) * 5, 5)):
        names.clear()
        weights = [weight(draw, 40, 128, kind) for kind in kinds]
        outs = project(x, weights, keep=Keep(0.5), backend=gpu(Counting()))
        expected = project(x, weights, keep=Keep(0.5), backend=REFERENCE)
        assert len(names) == launches
        assert outs.read is not None and expected.read is not None
        assert outs.read.item() == expected.read.item()
        for ours, reference in zip(outs.outs, expected.outs, strict=True):
            assert cases.error(ours, reference) < 1e-5


@checked
@pytest.mark.parametrize("rows", [0, 1])
def test_few_outputs_and_no_rows_are_no_special_case_for_the_caller(rows: int) -> None:
    draw = np.random.default_rng(0)
    x, few_outputs = cases.normal(draw, (rows, 128)), weight(draw, 5, 128, PLAIN)
    outs = [project(x, [few_outputs], backend=b).outs[0] for b in (gpu(MslLauncher()), REFERENCE)]
    assert outs[0].shape == (rows, 5)
    assert cases.error(*outs) < 1e-5


@checked
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_that_take_no_part_are_not_read(rows: int) -> None:
    """Those of channels that no row keeps are a word at which the kernel reads out of bounds."""
    draw = np.random.default_rng(1)
    x = cases.normal(draw, (rows, 256))
    whole = weight(draw, 72, 256, PLAIN)
    codes = np.array(whole.codes)
    codes[:, ~np.array((mx.abs(x) > 0.8).any(axis=0))] = 0xDEADBEEF
    trapped = Weight(mx.array(codes), whole.scales, whole.biases, 72, 4, 64)

    def trap(text: str) -> str:
        found = "  return words;\n"
        assert found in text
        return text.replace(
            found, f"  if (words.word[0] == 0xDEADBEEFu) words.word[0] = first[1 << 28];\n{found}"
        )

    backend = gpu(MslLauncher(edit=trap))
    outs = [project(x, [w], keep=Keep(0.8), backend=backend).outs[0] for w in (whole, trapped)]
    assert mx.array_equal(*outs)
    with pytest.raises(ReportError, match=r"OUT OF BOUNDS|FAULT"):
        project(x, [trapped], keep=Keep(0.7), backend=backend)


@pytest.mark.parametrize("bits", FACTORS["bits"])
@pytest.mark.parametrize("rows", range(1, 9))
def test_every_spread_fits_in_threadgroup_memory(bits: int, rows: int) -> None:
    for groups, tiles in ((1, 1), (20, 1), (1, 500), (20, 500)):
        way = spread(rows, groups, bits, tiles)
        floats = 32 * way.rows + 32 + way.rows * way.words * (32 // bits) + way.rows + 1
        assert 1 <= way.simd_groups <= 16 and 1 <= way.rows <= rows
        assert 4 * floats * way.simd_groups <= 32768
        assert way.rows * (32 // bits) <= 64


class Broken:
    """A device that computes zeros, or nothing."""

    strategy = SHUFFLE

    def __init__(self, error: str = "") -> None:
        self.error = error

    def geometry(self, shape: Any) -> Any:
        raise AssertionError

    def __call__(self, kernel: Kernel, *call: Any) -> list[mx.array]:
        if self.error:
            raise RuntimeError(self.error)
        return [mx.zeros(shape, dtype) for shape, dtype in call[-1]]


def test_the_probe_turns_away_a_device_that_computes_something_else() -> None:
    with pytest.raises(BackendUnavailableError, match="others than those of the reference"):
        check(gpu(Broken()))
    with pytest.raises(BackendUnavailableError, match=r"no such instruction$"):
        check(gpu(Broken("no such instruction\nand a long listing")))
    check(REFERENCE)


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_without_its_device_a_named_backend_never_falls_back(name: str) -> None:
    if cases.available_backends()[name] is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(BackendUnavailableError, match=r"no .* device|another device|products"):
        resolve_backend(name)
    assert resolve_backend("auto").name != name


@checked
def test_a_number_that_is_none_takes_part() -> None:
    """As in the reference: an overflow is not hidden by leaving it out."""
    x = mx.where(mx.arange(128) == 7, float("nan"), mx.ones((1, 128)))
    (out,) = project(
        x,
        [weight(np.random.default_rng(0), 40, 128, PLAIN)],
        keep=Keep(2.0),
        backend=gpu(MslLauncher()),
    ).outs
    assert mx.isnan(out).all()
