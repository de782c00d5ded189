"""How many threads there are changes no bit of a product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import cpu

REPOSITORY = Path(__file__).parents[2]

PRODUCTS = """
import hashlib
import mlx.core as mx
import numpy as np
from leankv_mlx.projections import Keep, Norm, project, relay, resolve_backend

def weight(outputs, inputs, bits):
    codes = mx.quantize(mx.random.normal((outputs, inputs)).astype(mx.float16), 32, bits)
    return relay(*codes, 32, bits)

mx.random.seed(1)
digest = hashlib.blake2b()
pair, norm = [weight(1500, 640, bits) for bits in (4, 6)], Norm(mx.ones((640,)), 1e-5)
for rows in (1, 3, 8, 70):
    x = mx.random.normal((rows, 640))
    for keep in (None, Keep(0.5)):
        for gate in (None, "silu"):
            found = project(x, pair, norm=norm, keep=keep, gate=gate,
                            backend=resolve_backend("cpu"))
            for out in found.outs:
                digest.update(np.array(out).tobytes())
print(digest.hexdigest())
"""


def test_threads_change_no_bit() -> None:
    try:
        cpu.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    digests = set()
    for threads in (1, 2, 5, 4000):
        done = subprocess.run(
            [sys.executable, "-c", PRODUCTS],
            cwd=REPOSITORY,
            env=os.environ | {"LEANKV_THREADS": str(threads), "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
