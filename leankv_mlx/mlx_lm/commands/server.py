"""`mlx_lm.server` with `--kv`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from typing import Any

from leankv_mlx.config import UNCOMPRESSED
from leankv_mlx.mlx_lm.attachment import Attachment
from leankv_mlx.mlx_lm.commands.session import Method, Session, backend_text
from leankv_mlx.mlx_lm.loading import resolve_model
from leankv_mlx.mlx_lm.usage import measure, summary_line


class Server(Session):
    """One run of it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._backend = UNCOMPRESSED  # of the model that is served

    def accept(self, args: argparse.Namespace) -> None:
        """Find the models now: the server loads them in a thread, where an error would only stop
        the thread."""
        super().accept(args)
        for name in filter(None, (args.model, args.draft_model)):
            resolve_model(name)

    @property
    def methods(self) -> dict[str, Method]:
        """See `Session`."""
        return super().methods | {"stream_generate": self.stream_generate}

    def keep(self, attachment: Attachment) -> None:
        """A server may drop a model for another; its attachment then goes with it."""
        self._backend = backend_text(attachment)
        logging.info(
            f"leankv: {attachment.config.spec()}, {attachment.compressed_layers} of "
            f"{len(attachment.report)} layers compressed, backend {self._backend}"
        )

    def stream_generate(
        self, original: Callable[..., Any], *args: Any, prompt_cache: Any, **options: Any
    ) -> Iterator[Any]:
        """mlx-lm's `stream_generate` in its server; the log gets a line for each request."""
        try:
            yield from original(*args, prompt_cache=prompt_cache, **options)
        finally:
            logging.info(summary_line(measure(prompt_cache), self._backend))
