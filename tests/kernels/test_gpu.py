"""The GPU backends around their kernels: availability, launch geometry, sizes.

Tests marked `metal` and `cuda` need the device and skip without it, with the reason. Where it is
there, the backend is also a row of the parity matrix.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from leankv_mlx.benchmarks.tune import tune_attention
from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.shape import Shape as LayerShape
from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import CompressionConfig, Rounding
from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import Centers, Rows, available_backends, resolve_backend
from leankv_mlx.kernels.encode import encode_ops
from leankv_mlx.kernels.gpu import Kernel, devices, make_backend, probe
from leankv_mlx.kernels.gpu.attention import MAX_ROWS
from leankv_mlx.kernels.gpu.geometry import CANDIDATES, Geometry, Shape, Tuner, built_in
from leankv_mlx.kernels.gpu.launch import MAX_GROUPS, SHUFFLE, MlxLauncher, side_code
from leankv_mlx.resources import metal_sources

DEVICES = [
    pytest.param("metal", marks=pytest.mark.metal),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("name", DEVICES)
def test_on_its_device_the_backend_is_what_auto_takes(name: str) -> None:
    reason = available_backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    assert resolve_backend("auto").name == name


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_without_its_device_a_named_backend_never_falls_back(name: str) -> None:
    reason = available_backends()[name]
    if reason is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(BackendUnavailableError, match=r"no .* device|another device|kernels"):
        resolve_backend(name)
    assert resolve_backend("auto").name != name


def test_a_device_on_which_mlx_does_not_compute_is_no_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, device in devices.DEVICES.items():
        monkeypatch.setitem(devices.DEVICES, name, replace(device, available=lambda: True))
        with mx.stream(mx.cpu), pytest.raises(BackendUnavailableError, match="another device"):
            resolve_backend(name)


class Nothing:
    """A device whose results are all zeros."""

    strategy = SHUFFLE

    def geometry(self, shape: Shape) -> Geometry:
        return Geometry(1, 1, 1)

    def __call__(self, kernel: Kernel, *call: Any) -> list[mx.array]:
        return [mx.zeros(shape, dtype) for shape, dtype in call[-1]]


class Failing(Nothing):
    """A device whose compiler fails."""

    def __call__(self, kernel: Kernel, *call: Any) -> list[mx.array]:
        raise RuntimeError("no such instruction\nand a long listing")


def test_the_probe_turns_away_a_device_that_computes_something_else() -> None:
    with pytest.raises(BackendUnavailableError, match="something else"):
        probe.check(make_backend("nothing", Nothing()))
    with pytest.raises(BackendUnavailableError, match=r"no such instruction$"):
        probe.check(make_backend("failing", Failing()))
    probe.check(resolve_backend("reference"))


@pytest.mark.parametrize(
    "operation",
    ["encode", "append", "decode_attention", "append_batch", "decode_attention_batch"],
)
def test_the_probe_sees_each_operation(operation: str) -> None:
    reference, nothing = resolve_backend("reference"), make_backend("nothing", Nothing())
    with pytest.raises(BackendUnavailableError, match="something else"):
        probe.check(replace(reference, **{operation: getattr(nothing, operation)}))


def test_the_probe_sees_an_encoder_that_does_not_shape() -> None:
    def plain(rows: Rows, centers: Centers, format: Format, how: Rounding, _: Any) -> mx.array:
        return encode_ops(rows, centers, format, how)

    with pytest.raises(BackendUnavailableError, match="something else"):
        probe.check(replace(resolve_backend("reference"), encode=plain))


def test_a_kernel_is_compiled_once_by_name() -> None:
    made = []

    def compile(**arguments: Any) -> Any:
        made.append(arguments)
        return lambda **call: [mx.zeros(s) for s in call["output_shapes"]]

    launch = MlxLauncher(compile, SHUFFLE, Tuner("cuda", "GPU", Path("nowhere")))
    kernel = Kernel("k", ("layout.metal",), ("x",), ("y",), ("N",), "  y[0] = x[0];")
    for n in (1, 2):
        (y,) = launch(kernel, [mx.ones(8)], {"N": n}, (32, 1, 1), (32, 1, 1), [((n,), mx.float32)])
        assert y.shape == (n,)
    assert len(made) == 1 and "lkv_group_bits" in made[0]["header"]


def test_a_layer_that_no_kernel_knows_is_the_references() -> None:
    backend = make_backend("failing", Failing())
    widest = TILE * MAX_GROUPS
    for k_dim, v_dim, name in ((widest, 64, "failing"), (widest + 1, 64, "reference"),
                               (64, widest + 1, "reference")):  # fmt: skip
        shape = LayerShape(1, k_dim, v_dim)
        layer = Layer(shape, CompressionConfig(), backend, (mx.float32, mx.float32))
        assert layer.backend.name == name


def test_a_format_is_one_positive_integer_for_each_side() -> None:
    assert side_code((4, 0, 3, 8, 2)) == 3 | 2 << 6 | 4 << 9 | 1 << 12
    assert side_code((8,) * MAX_GROUPS) < 2**31


def test_the_sources_are_found() -> None:
    names = {path.name for path in metal_sources().iterdir()}
    assert {"compat.h", "encode.metal", "decode_attention.metal", "merge_splits.metal",
            "dequantize.metal", "project.metal", "repack.metal"} <= names  # fmt: skip


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
def test_every_geometry_fits_in_threadgroup_memory(head_dim: int) -> None:
    for slots in (1, 100, 4096, 32768, 1 << 20):
        for kind in ("metal", "cuda"):
            g = built_in(kind, Shape(8, head_dim, slots))
            assert 1 <= g.splits <= 64
            assert threadgroup_bytes(head_dim, g.simd_groups) <= 32768
    for _, simd_groups, _ in CANDIDATES:
        assert threadgroup_bytes(head_dim, simd_groups) <= 32768


def threadgroup_bytes(head_dim: int, simd_groups: int) -> int:
    """Of the body of kernels/gpu/attention.py, with the most query rows."""
    floats = MAX_ROWS * (head_dim + 1) + simd_groups * (32 * MAX_ROWS + head_dim + 2) + 1
    return 4 * floats


def test_longer_sequences_are_split_more_and_lengths_of_a_bucket_alike() -> None:
    splits = [built_in("metal", Shape(8, 128, 2**n)).splits for n in range(5, 20)]
    assert splits == sorted(splits) and splits[0] == 1 and splits[-1] > 4
    assert Shape(8, 128, 4097).bucket == Shape(8, 128, 8192).bucket
    assert Shape(8, 128, 4096).bucket == Shape(8, 128, 4097).bucket - 1


def test_the_tuner_keeps_the_fastest_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "geometry.json"
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    tuner = Tuner("metal", "Some GPU", path)
    shape = Shape(8, 128, 5000)
    assert tuner.choose(shape) == built_in("metal", shape)

    def run() -> None:
        geometry = tuner.choose(shape)
        clock[0] += abs(geometry.splits - 16) + geometry.simd_groups + geometry.blocks

    best = tuner.tune(shape, run)
    assert best == tuner.choose(shape) == Geometry(16, 4, 1)
    again = Tuner("metal", "Some GPU", path)
    assert again.choose(Shape(8, 128, 6000)) == best  # the same bucket
    assert Tuner("metal", "Another GPU", path).choose(shape) == built_in("metal", shape)


def test_tuning_runs_the_real_operation(tmp_path: Path) -> None:
    """On the device only `run` takes long; here a device that computes nothing has it all."""
    launched = []

    def compile(**arguments: Any) -> Any:
        def run(**call: Any) -> list[mx.array]:
            launched.append((arguments["name"], call["grid"]))
            return [mx.zeros(shape) for shape in call["output_shapes"]]

        return run

    launch = MlxLauncher(compile, SHUFFLE, Tuner("cuda", "GPU", tmp_path / "g.json"))
    best = tune_attention(launch, heads=2, group=4, head_dim=64, slots=256)
    assert best in {Geometry(*candidate) for candidate in CANDIDATES}
    grids = {grid for name, grid in launched if name == "leankv_decode_attention"}
    assert len(grids) == len({(groups, splits) for splits, groups, _ in CANDIDATES})


def test_a_broken_cache_file_is_like_none(tmp_path: Path) -> None:
    path = tmp_path / "geometry.json"
    for text in ("{", "[]", '{"a": {"splits": 1}}', '{"a": 3}'):
        path.write_text(text)
        shape = Shape(8, 128, 5000)
        assert Tuner("cuda", "GPU", path).choose(shape) == built_in("cuda", shape)
