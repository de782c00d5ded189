"""The pool of the native backend where threads cannot be made: fewer of them, never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import cpu

REPOSITORY = Path(__file__).parents[2]

ATTENTION = """
import resource
import mlx.core as mx
import numpy as np
from leankv_mlx.cache import CompressedKVCache, owner_of

def step(backend):
    mx.random.seed(1)
    cache = CompressedKVCache(f"leankv:backend={backend}")
    cache.update_and_fetch(*mx.random.normal((2, 1, 4, 4096, 128)))
    keys, values = cache.update_and_fetch(*mx.random.normal((2, 1, 4, 1, 128)))
    out = owner_of(keys, values).attend(mx.random.normal((1, 8, 1, 128)), scale=0.1, mask=None)
    return np.array(out)

expected = step("reference")
room = ROOM
if room:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
found = [step("cpu") for _ in range(3)]
assert all(np.array_equal(found[0], x) for x in found)
np.testing.assert_allclose(found[0], expected, rtol=1e-2, atol=1e-3)
print("done")
"""


@pytest.mark.parametrize("room", [0, 300 << 20])
def test_a_worker_that_cannot_be_made_is_done_without(room: int) -> None:
    """Hang: 255 stacks of 8 MB do not fit what `ulimit -v` leaves."""
    try:
        cpu.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if room and not Path("/proc/self/statm").exists():
        pytest.skip("needs to know how much address space is taken")
    done = subprocess.run(
        [sys.executable, "-c", ATTENTION.replace("ROOM", str(room))],
        cwd=REPOSITORY,
        env=os.environ | {"LEANKV_THREADS": "4000", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
