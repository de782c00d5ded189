"""mlx-lm's `ResponseGenerator` with our loop."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import mlx.core as mx

from leankv_mlx.mlx_lm.serving.client import Client
from leankv_mlx.mlx_lm.serving.loop import Loop
from leankv_mlx.mlx_lm.serving.report import Report
from leankv_mlx.mlx_lm.serving.served import Served


def generator_of(
    original: Any,
    serve: Callable[[Any, Any], Served],
    summary: Callable[[list[Any]], str],
) -> Any:
    """The subclass of mlx-lm's `ResponseGenerator`.

    Args:
        serve, summary: see `Loop`.
    """

    class ResponseGenerator(original):  # type: ignore[misc]
        server = sys.modules[original.__module__]

        def __init__(self, *args: Any, **options: Any) -> None:
            self._report = Report()
            self._opened = Event()
            self._failure: Exception | None = None
            self.served: Served | None = None  # first
            super().__init__(*args, **options)

        def wait(self) -> None:
            """Until the model is there.

            Raises:
                Exception: it could not be loaded.
            """
            self._opened.wait()
            if self._failure is not None:
                raise self._failure

        def report(self) -> dict[str, Any]:
            """For `GET /v1/kv`; may be called in any thread."""
            return self._report.content()

        def generate(
            self,
            request: Any,
            args: Any,
            progress_callback: Callable[[int, int], None] | None = None,
            client: Client | None = None,
        ) -> tuple[Any, Iterator[Any]]:
            """mlx-lm's own, which also ends when the client of the connection has left."""
            client = client or Client()
            if not self.generation_available():
                raise RuntimeError("generation thread died")
            self.requests.put((client, request, args))
            answers = client.answers(self.generation_available)
            context = next(answers)
            if isinstance(context, Exception):
                raise context
            return context, _pieces(answers, progress_callback)

        def _generate(self) -> None:
            try:
                self._run(Loop(self, self.prompt_cache, self._report, serve, summary))
            finally:
                # In the thread that made it, as all of mlx.
                self.model_provider.reset()
                del self.prompt_cache
                gc.collect()
                mx.clear_streams()

        def _run(self, loop: Loop) -> None:
            try:
                self._open_default(loop)
            except Exception as error:
                self._failure = error
                return
            finally:
                self._opened.set()
            if self._is_distributed:  # all of them draw the same tokens
                state: Any = mx.random.state
                seed: Any = mx.distributed.all_sum(state[0]).view(mx.uint64).item()
                mx.random.seed(seed)
            loop.run()

        def _open_default(self, loop: Loop) -> None:
            if self.cli_args.model is not None:
                default = "default_model"  # what a request without a name asks for
                name = self.server.ModelDescription(model=default, draft=default, adapter=None)
                self.served = loop.open(name)

    return ResponseGenerator


def _pieces(
    answers: Iterator[Any], progress_callback: Callable[[int, int], None] | None
) -> Iterator[Any]:
    for answer in answers:
        if answer is None:
            return
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            if progress_callback is not None:
                progress_callback(*answer)
        else:
            yield answer
