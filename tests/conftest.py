"""What every test needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from leankv_mlx.blas import bind

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    # Each product waits for all threads, some of which wait for the other workers of the test run.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
bind()  # before a test imports mlx


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of the user go to a folder of the test run, in subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANKV_HOME", str(tmp_path_factory.mktemp("home")))
        for size in ("COLUMNS", "LINES"):  # pytest-xdist's: no screen is cut to them
            patch.delenv(size, raising=False)
        yield
