"""MLX's own Metal code: a kernel of it in the harness, and ours behind its prelude."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.kernels.decode_attention import decode_attention_ops
from leankv_mlx.kernels.gpu import make_backend, probe
from leankv_mlx.projections import Backend
from leankv_mlx.projections import gpu as products
from tests.kernels import cases
from tests.msl import compiler, mlx_headers
from tests.msl.dispatch import FORWARD, RANDOM, REVERSE, Run, dispatch
from tests.msl.launcher import MslLauncher
from tests.msl.source import to_cpp

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
CXX17 = ("-std=c++17", "-w")


@pytest.fixture(scope="module")
def prelude() -> str:
    try:
        return mlx_headers.prelude()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("order", [FORWARD, REVERSE, RANDOM])
def test_mlx_attention_is_right_and_free_of_reports(prelude: str, order: int) -> None:
    """A kernel that is known to be right must not be blamed."""
    heads, group, tokens, dim = 2, 2, 45, 64
    draw = np.random.default_rng(0)
    q, k, v = (
        draw.standard_normal((n, t, dim)).astype(np.float16)
        for n, t in ((heads * group, 1), (heads, tokens), (heads, tokens))
    )
    source = to_cpp(mlx_headers.attention(), prelude, "sdpa_vector<half, 64>", "typedef half T;\n")
    strides = {
        f"{side}_{axis}_stride": np.array([n], np.uint64)
        for side in "kv"
        for axis, n in (("head", tokens * dim), ("seq", dim))
    }
    unused = {name: np.zeros(1, np.float32) for name in source.buffers}
    result = dispatch(
        compiler.build_kernel(source.cpp, check=True, flags=CXX17),
        source,
        unused
        | strides
        | {
            "queries": q, "keys": k, "values": v,
            "gqa_factor": np.array([group], np.int32), "N": np.array([tokens], np.int32),
            "scale": np.array([dim**-0.5], np.float32),
        }
        | {"out": None},  # type: ignore[dict-item]
        {"out": ((heads * group, dim), np.float16)},
        (heads * group * 1024, 1, 1),
        (1024, 1, 1),
        Run(order=order),
    )  # fmt: skip
    assert not result.reports
    wide = (np.repeat(x.astype(np.float32), group, axis=0) for x in (k, v))
    k, v = wide
    scores = (q.astype(np.float32) @ k.swapaxes(1, 2)) * dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True) @ v)[:, 0]
    assert np.abs(result.outputs["out"] - expected).max() < 1e-3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_our_kernels_compile_behind_the_prelude(prelude: str, dtype: mx.Dtype) -> None:
    launch = MslLauncher(prelude=prelude, flags=CXX17)
    backend = make_backend("msl-check", launch)
    case = cases.case(
        k_bits=4, v_bits=3, dims=(64, 64), group=2, new=2, lengths="partial", tiers=1, exact=40,
        sink_logits=True, mask="causal", dtype=dtype, rotated=True,
    )  # fmt: skip
    outs = [case.attend(op).out for op in (backend.decode_attention, decode_attention_ops)]
    assert cases.error(*outs) < cases.TOLERANCE[dtype]
    assert case.rotations is not None and case.centers is not None
    backend.dequantize(case.tiers[0], case.centers, dtype)
    backend.encode(case.exact, case.centers, case.tiers[0].format, "search")
    backend.append(case.exact, case.exact, (case.rotations[1], case.rotations[1]))
    probe.check(backend)
    products.check(Backend("msl-check", products.GpuProject(launch)))
