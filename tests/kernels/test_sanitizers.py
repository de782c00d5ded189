"""The native kernels and their thread pool under the sanitizers of the compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import cpu

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "undefined", "thread"])
def test_kernels_run_clean(sanitizer: str, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs cmake and a C++ compiler")
    flag = f"-DLEANKV_SANITIZE={sanitizer}"
    subprocess.run([cmake, "-S", REPOSITORY, "-B", tmp_path, flag], check=True)
    subprocess.run([cmake, "--build", tmp_path, "--parallel"], check=True)
    arguments = ["threads-only"] if sanitizer == "thread" else []
    for threads in (2, 2 * (os.cpu_count() or 1)):  # more than processors: none waits awake
        done = subprocess.run(
            [tmp_path / "leankv_sanitize", *arguments],
            env=os.environ | {"LEANKV_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ERROR" not in done.stderr and "WARNING" not in done.stderr, done.stderr


def test_the_pool_outlives_neither_a_fork_nor_the_interpreter() -> None:
    """Attention on several threads, then again in a child process, then exit."""
    try:
        cpu.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    code = """
import os
import mlx.core as mx
from leankv_mlx.cache import CompressedKVCache, owner_of

def step(tokens):
    cache = CompressedKVCache("leankv:backend=cpu")
    cache.update_and_fetch(*mx.random.normal((2, 1, 4, tokens, 128)))
    keys, values = cache.update_and_fetch(*mx.random.normal((2, 1, 4, 1, 128)))
    mx.eval(owner_of(keys, values).attend(mx.random.normal((1, 8, 1, 128)), scale=0.1, mask=None))

step(8192)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"LEANKV_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
