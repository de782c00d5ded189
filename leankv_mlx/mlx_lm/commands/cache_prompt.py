"""`mlx_lm.cache_prompt` with `--kv`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leankv_mlx.errors import UsageError
from leankv_mlx.mlx_lm.cache_files import save_prompt_cache
from leankv_mlx.mlx_lm.commands.session import FINGERPRINT, Method, Session
from leankv_mlx.mlx_lm.loading import check_context
from leankv_mlx.mlx_lm.loops import telling


class CachePrompt(Session):
    """One run of it."""

    def accept(self, args: argparse.Namespace) -> None:
        """Find out now whether the file can be written."""
        super().accept(args)
        target = Path(args.prompt_cache_file)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise UsageError(f"cannot write {target}; name a file in a folder that exists.")

    @property
    def methods(self) -> dict[str, Method]:
        """See `Session`."""
        return super().methods | {
            "generate_step": self.generate_step,
            "make_prompt_cache": self.make_prompt_cache,
            "save_prompt_cache": self.save_prompt_cache,
        }

    def generate_step(
        self, original: Callable[..., Any], prompt: Any, *args: Any, **options: Any
    ) -> Any:
        """mlx-lm's `generate_step`, within the model's context."""
        check_context(self.context, len(prompt), -1)
        return telling(original)(prompt, *args, **options)

    def save_prompt_cache(
        self, original: Callable[..., Any], file: str, cache: list[Any], metadata: dict[str, str]
    ) -> Any:
        """mlx-lm's `save_prompt_cache`; compressed caches go into a file of our own format."""
        if self.config is None:
            return original(file, cache, metadata)
        return save_prompt_cache(file, cache, metadata | {FINGERPRINT: self.fingerprint})
