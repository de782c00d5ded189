"""The tester tested: right kernels pass in every order, and every planted bug is found."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.kernels.gpu.launch import Kernel
from tests.msl import bugs, compiler, lint
from tests.msl.bugs import NORMALIZE, SWAP, Bug
from tests.msl.dispatch import FORWARD, RANDOM, REVERSE, Run
from tests.msl.launcher import MslLauncher, ReportError

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")

ORDERS = ((FORWARD, 1), (REVERSE, 1), (RANDOM, 1), (RANDOM, 2))


def planted(bug: Bug) -> MslLauncher:
    def edit(text: str) -> str:
        assert bug.old in text
        return text.replace(bug.old, bug.new)

    return MslLauncher(edit=edit)


@pytest.mark.parametrize("kernel", [NORMALIZE, SWAP], ids=lambda k: k.name)
def test_right_kernels_pass(kernel: Kernel) -> None:
    for check, (order, seed) in itertools.product((True, False), ORDERS):
        out = bugs.run(kernel, MslLauncher(run=Run(check, order, seed)))
        assert mx.allclose(out, bugs.expected(kernel), rtol=1e-6)


@pytest.mark.parametrize("bug", bugs.FOUND_BY_THE_CHECKER, ids=lambda b: b.name)
def test_the_checker_finds(bug: Bug) -> None:
    with pytest.raises(ReportError, match=bug.says):
        bugs.run(bug.kernel, planted(bug))


@pytest.mark.parametrize("bug", bugs.FOUND_BY_THE_COMPILER, ids=lambda b: b.name)
def test_the_compiler_finds(bug: Bug) -> None:
    with pytest.raises(compiler.CompileError, match=bug.says):
        bugs.run(bug.kernel, planted(bug))


@pytest.mark.parametrize("bug", bugs.FOUND_BY_THE_LINT, ids=lambda b: b.name)
def test_the_lint_finds(bug: Bug) -> None:
    text = bug.kernel.header + "[[kernel]] void k() {" + bug.kernel.body + "}"
    assert lint.check(text) == []
    assert bug.says.replace("\\", "") in " ".join(lint.check(text.replace(bug.old, bug.new)))


def test_a_report_names_the_line() -> None:
    with pytest.raises(ReportError, match=r"total \+= sums\[k\]|@0x"):
        bugs.run(NORMALIZE, planted(bugs.FOUND_BY_THE_CHECKER[0]))


@pytest.mark.parametrize("offset", [400, -1500])
def test_the_fast_build_stops_at_a_guard_page(offset: int) -> None:
    bug = Bug("", NORMALIZE, "= x[i]", f"= x[(int)i + {offset}]", "")
    launch = MslLauncher(run=Run(check=False), edit=planted(bug).edit)
    with pytest.raises(ReportError, match="FAULT"):
        bugs.run(NORMALIZE, launch)


def test_a_missing_barrier_shows_in_the_order_of_threads() -> None:
    """Even without the checker: some order gives another result."""
    outs = [
        bugs.run(NORMALIZE, MslLauncher(run=Run(False, order, seed), edit=planted(
            bugs.FOUND_BY_THE_CHECKER[0]).edit))
        for order, seed in ORDERS
    ]  # fmt: skip
    assert any(not mx.allclose(out, bugs.expected(NORMALIZE), rtol=1e-6) for out in outs)


def test_another_lane_that_does_not_exist_gives_garbage() -> None:
    bug = Bug("", SWAP, "simd_shuffle_xor(shared[t ^ 1u], (ushort)1)",
              "simd_shuffle(shared[t ^ 1u], (ushort)40)", "")  # fmt: skip
    out = bugs.run(SWAP, planted(bug))
    assert not mx.allclose(out, bugs.expected(SWAP), rtol=1e-3)


def test_fast_math_is_not_exact() -> None:
    body = """
  out[thread_position_in_grid.x] = metal::fast::exp2(x[thread_position_in_grid.x]);
"""
    kernel = Kernel("exponent", (), ("x",), ("out",), (), body)
    x = mx.linspace(0, 1, 64)
    outs = [
        MslLauncher(run=Run(jitter=jitter))(
            kernel, [x], {}, (64, 1, 1), (64, 1, 1), [((64,), mx.float32)]
        )[0]
        for jitter in (0, 1, 2)
    ]
    assert len({np.array(out).tobytes() for out in outs}) == 3
    for out in outs:
        assert mx.allclose(out, mx.power(2.0, x), rtol=1e-6)


def test_fibers_of_the_c_library_do_the_same() -> None:
    """Where the runtime has no assembly to switch fibers, it takes swapcontext."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "right_kernels"]
    environment = os.environ | {"LEANKV_MSL_UCONTEXT": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
