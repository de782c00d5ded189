"""Every barrier of the kernels is needed: without it, the checker reports a race."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.format import Format
from leankv_mlx.kernels import Centers, Rows
from leankv_mlx.kernels.gpu.attention import DecodeAttention
from leankv_mlx.kernels.gpu.encode import Encode
from leankv_mlx.kernels.gpu.geometry import Geometry
from leankv_mlx.kernels.gpu.launch import CUBIC, TABLE
from leankv_mlx.projections import Backend, Keep, Norm, project, relay
from leankv_mlx.projections.gpu import GpuProject
from leankv_mlx.resources import metal_sources
from tests.kernels import cases
from tests.msl import compiler
from tests.msl.launcher import MslLauncher, ReportError

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
_BARRIER = re.compile(r"^ *(?:threadgroup|simdgroup)_barrier\(.*\);$", re.M)


def attend(launch: MslLauncher) -> None:
    """Two tiles of query rows, several blocks and several groups of exact rows a SIMD group."""
    case = cases.case(
        k_bits=4, v_bits=4, dims=(64, 64), group=3, new=3, lengths="full", tiers=1, exact=103,
        sink_logits=False, mask="causal", dtype=mx.float16, rotated=True, heads=2, blocks=6,
    )  # fmt: skip
    launch.spread = Geometry(1, 2, 1)
    for skip in (0.0, 0.3):
        replace(case, skip=skip).attend(DecodeAttention(launch))


def encode(launch: MslLauncher) -> None:
    draw = np.random.default_rng(0)
    rows = Rows(*(cases.normal(draw, (1, 40, 64)) for _ in range(2)))
    centers = Centers(*(cases.normal(draw, (1, 64)) for _ in range(2)))
    Encode(launch)(rows, centers, Format((4, 3), (2, 8)), "rms")


def multiply(launch: MslLauncher) -> None:
    """Two strips one after the other, several groups of channels and lists a SIMD group."""
    draw = np.random.default_rng(0)
    dense = (cases.normal(draw, (40, 640)) for _ in range(2))
    weights = [relay(*mx.quantize(w, 64, 8), 64, 8) for w in dense]
    x, norm = cases.normal(draw, (8, 640)), Norm(mx.ones(640), 1e-5)
    backend = Backend("msl-check", GpuProject(launch))
    project(x, weights, norm=norm, keep=Keep(0.5), gate="silu", backend=backend)


USERS = {"decode_attention.metal": attend, "encode.metal": encode, "project.metal": multiply}
BARRIERS = [
    (file, match.start(), match[0])
    for file in sorted(path.name for path in metal_sources().glob("*.metal"))
    for match in _BARRIER.finditer((metal_sources() / file).read_text())
]


def test_no_barrier_is_missed() -> None:
    text = "".join(
        (metal_sources() / file).read_text() for file in {file for file, _, _ in BARRIERS}
    )
    assert len(BARRIERS) == text.count("_barrier(") >= 13
    others = {path for path in metal_sources().glob("*.metal") if path.name not in USERS}
    assert not any("_barrier(" in path.read_text() for path in others)


def test_the_kernels_are_clean_as_they_are() -> None:
    for strategy in (CUBIC, TABLE):
        attend(MslLauncher(strategy))
    encode(MslLauncher())
    multiply(MslLauncher())


@pytest.mark.parametrize(
    ("file", "start", "barrier"), BARRIERS, ids=[f"{file}-{at}" for file, at, _ in BARRIERS]
)
def test_without_this_barrier_there_is_a_race(file: str, start: int, barrier: str) -> None:
    content = (metal_sources() / file).read_text()
    without = content[:start] + content[start + len(barrier) :]

    def edit(text: str) -> str:
        return text.replace(content, without)  # kernels that do not use the file stay

    with pytest.raises(ReportError, match=r"RACE|UNINITIALISED"):
        USERS[file](MslLauncher(edit=edit))
