"""OpenBLAS in place of MLX's own BLAS: whether it is in use, what it computes, when it stays away.

Every case is a process of its own, because a BLAS is bound for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leankv_mlx import blas

ROOT = Path(blas.__file__).parents[1]
CAN_BIND = not blas.bind().reason
needs_openblas = pytest.mark.skipif(not CAN_BIND, reason=blas.bind().reason or "bound")

TELL = """
found = bind()
import mlx.core as mx
mx.eval(mx.ones((20, 30)) @ mx.ones((30, 40)))
print(json.dumps([found.name, found.threads, found.reason, products()]))
"""


def python(code: str, **environment: str) -> Any:
    """What the last line of some code says, as JSON."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import json\nfrom leankv_mlx.blas import bind, products\n{code}"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "LEANKV_BLAS"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@needs_openblas
def test_products_of_mlx_go_through_openblas() -> None:
    name, threads, reason, products = python(TELL)
    assert name.startswith("OpenBLAS ")
    assert threads >= 1
    assert (reason, products) == ("", 1)


@needs_openblas
def test_openblas_takes_its_own_number_of_threads() -> None:
    assert python(TELL, OPENBLAS_NUM_THREADS="1")[1] == 1


@needs_openblas
def test_binding_twice_changes_nothing() -> None:
    assert python("first = bind()\nimport mlx.core\nprint(json.dumps(first is bind()))")


def test_the_user_can_decline() -> None:
    assert python(TELL, LEANKV_BLAS="off") == ["", 0, "LEANKV_BLAS=off", 0]


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("import mlx.core", "imported before"),
        ("import leankv_mlx.blas as b; b.find_spec = lambda name: None", "is not installed"),
        ("import leankv_mlx.blas as b; b._FORWARDER = b.Path('/no/such.so')", "was not built"),
        ("import leankv_mlx.blas as b; b._openblas = lambda: b.Path('/no/such.so')", "/no/such.so"),
        ("import leankv_mlx.blas as b; b._openblas = lambda: b._FORWARDER", "openblas_get_config"),
        ("import sys; sys.platform = 'darwin'", "the system's BLAS"),
    ],
)
def test_where_it_cannot_be_had_mlx_keeps_its_own(before: str, reason: str) -> None:
    if not CAN_BIND and reason in ("/no/such.so", "openblas_get_config", "is not installed"):
        pytest.skip(blas.bind().reason)
    name, threads, why, products = python(f"{before}\n{TELL}")
    assert (name, threads, products) == ("", 0, 0)
    assert reason in why


def test_importing_it_loads_nothing() -> None:
    code = "import sys\nprint(json.dumps('libleankv_blas' in open('/proc/self/maps').read()))"
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    assert python(code) is False


PRODUCTS = """
bind()
import mlx.core as mx
import numpy as np
rng = np.random.default_rng(0)
worst = 0.0
for m, k, n in [(1, 1, 1), (1, 64, 7), (1, 700, 300), (2, 64, 300), (70, 33, 65), (1, 0, 5)]:
    a, b = rng.normal(size=(m, k)), rng.normal(size=(n, k))
    turned = mx.array(b.T.copy().astype(np.float32)), mx.array(b.astype(np.float32)).T
    for right in turned:
        x = mx.array(a.astype(np.float32))
        for left in (x, mx.array(a.T.copy().astype(np.float32)).T):
            plain = np.array(left @ right)
            added = np.array(mx.addmm(mx.ones((m, n)), left, right, alpha=0.5, beta=2.0))
            worst = max(worst, abs(plain - a @ b.T).max(), abs(added - a @ b.T / 2 - 2).max())
batched = rng.normal(size=(3, 1, 40)), rng.normal(size=(3, 40, 5))
found = np.array(mx.array(batched[0].astype(np.float32)) @ mx.array(batched[1].astype(np.float32)))
worst = max(worst, abs(found - batched[0] @ batched[1]).max())
pair = [(rng.normal(size=s) + 1j * rng.normal(size=s)).astype(np.complex64)
        for s in ((4, 30), (30, 6))]
worst = max(worst, abs(np.array(mx.array(pair[0]) @ mx.array(pair[1])) - pair[0] @ pair[1]).max())
print(json.dumps([float(worst), products()]))
"""


@needs_openblas
def test_products_are_right_for_one_row_and_for_many() -> None:
    worst, products = python(PRODUCTS)
    assert worst < 1e-4
    assert products >= 24


@needs_openblas
def test_the_commands_bind_it_before_they_load_a_model() -> None:
    code = (
        "from leankv_mlx.cli import app\n"
        "code = app.run(['generate', '--prompt', 'hello', '--max-tokens', '2'])\n"
        "from leankv_mlx import blas\n"
        "print(json.dumps([code, blas.bind().reason]))"
    )
    assert python(code) == [0, ""]


@needs_openblas
@pytest.mark.parametrize("flags", [["--kv", "leankv"], ["--temp", "0"]])
def test_the_hook_binds_it_for_commands_with_kv_alone(flags: list[str]) -> None:
    code = (
        "import sys\n"
        "from leankv_mlx.mlx_lm import hook\n"
        "hook.uninstall()  # this very code names mlx_lm, so Python's start has called it\n"
        f"sys.orig_argv = {['python', '-m', 'mlx_lm.generate', *flags]!r}\n"
        "hook.install()\n"
        "print(json.dumps('libleankv_blas' in open('/proc/self/maps').read()))"
    )
    assert python(code) is ("--kv" in flags)


@needs_openblas
def test_doctor_tells_what_is_bound() -> None:
    told = "from leankv_mlx.cli import app\napp.run(['doctor', '--json'])"

    def doctor(**environment: str) -> Any:
        ran = subprocess.run(
            [sys.executable, "-c", told],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return json.loads(ran.stdout)["blas"]

    found = doctor(LEANKV_BLAS="")
    assert found["name"] == blas.bind().name
    assert found["reason"] is None
    assert found["gflops"] > 0
    declined = doctor(LEANKV_BLAS="off")
    assert (declined["name"], declined["reason"]) == ("MLX's own", "LEANKV_BLAS=off")
