"""What every test needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from leankv_mlx.blas import bind

bind()  # before a test imports mlx


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of the user go to a folder of the test run, in subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANKV_HOME", str(tmp_path_factory.mktemp("home")))
        yield
