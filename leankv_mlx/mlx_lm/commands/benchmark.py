"""`mlx_lm.benchmark` with `--kv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leankv_mlx.mlx_lm.commands.session import Method, Session


class Benchmark(Session):
    """One run of it."""

    @property
    def methods(self) -> dict[str, Method]:
        """See `Session`."""
        return super().methods | {"batch_generate": self.batch_generate}

    def batch_generate(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """mlx-lm's `batch_generate`; the caches of a trial are kept, so that their bytes can be
        counted, until the next one begins."""
        self.caches = []
        response = original(*args, **options, return_prompt_caches=True)
        self.caches = response.caches
        return response
