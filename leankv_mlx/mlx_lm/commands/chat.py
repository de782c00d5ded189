"""`mlx_lm.chat` with `--kv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leankv_mlx.mlx_lm.commands.session import Method, Session


class Chat(Session):
    """One run of it."""

    @property
    def methods(self) -> dict[str, Method]:
        """See `Session`."""
        return super().methods | {"make_prompt_cache": self.make_prompt_cache}

    def make_prompt_cache(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """See `Session`; a conversation that was reset counts no more."""
        made = super().make_prompt_cache(original, *args, **options)
        del self.caches[:-1]
        return made
