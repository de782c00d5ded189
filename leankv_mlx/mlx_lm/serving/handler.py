"""mlx-lm's HTTP handler, with an answer to all that a client may send, and `GET /v1/kv`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from leankv_mlx.errors import (
    ClientLeftError,
    ContextLengthError,
    MemoryLimitError,
    RequestError,
)
from leankv_mlx.faults import described
from leankv_mlx.mlx_lm.serving.client import Client
from leankv_mlx.terminal import line

_MOST_BODY_BYTES = 1 << 28
_IDLE_S = 60.0
"""How long a client may take nothing of what is sent to it, or send nothing of its request."""
_GONE = (ClientLeftError, ConnectionError, TimeoutError)


def handler_of(original: Any) -> Any:
    """The subclass of mlx-lm's `APIHandler` for our `ResponseGenerator`."""

    class APIHandler(original):  # type: ignore[misc]
        response_generator: Any
        timeout = _IDLE_S
        _begun = False  # whether the client has an answer's head
        _refused: int | None = None  # the status for what mlx-lm calls 404

        def do_GET(self) -> None:
            if self.path == "/v1/kv":
                self._reply(200, self.response_generator.report())
            else:
                super().do_GET()

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length")
            try:
                if length is not None and not 0 <= int(length) <= _MOST_BODY_BYTES:
                    self._reply(413, {"error": f"Content-Length {length} is out of range"})
                    return
            except ValueError:
                pass  # mlx-lm has an answer to it
            self._answered(super().do_POST, status=400)

        def validate_model_parameters(self) -> None:
            super().validate_model_parameters()
            if not isinstance(self.stream_options, dict | None):
                raise ValueError("stream_options must be of type dict")
            if self.stream_options is not None:
                self.stream_options.setdefault("include_usage", False)
            stop = self.body.get("stop") or []
            if not isinstance(stop, str | list) or not all(isinstance(x, str) for x in stop):
                raise ValueError("stop must be a string or a list of strings")

        def handle_completion(self, *args: Any) -> None:
            generator = self.response_generator
            client = Client(self.connection)
            self.response_generator = _ForClient(generator, client, self._refuse)
            try:
                self._answered(lambda: super(APIHandler, self).handle_completion(*args), status=500)
            finally:
                client.left = True
                self.response_generator = generator

        def end_headers(self) -> None:
            self._begun = True
            super().end_headers()

        def _set_completion_headers(self, status_code: int = 200) -> None:
            super()._set_completion_headers(self._refused or status_code)

        def _refuse(self, error: Exception) -> None:
            if isinstance(error, MemoryLimitError):
                self._refused = 413
            elif isinstance(error, RequestError | ContextLengthError):
                self._refused = 400

        def _answered(self, answer: Callable[[], Any], status: int) -> None:
            """An error ends this answer with one line, and never more than this connection."""
            try:
                answer()
            except _GONE:
                self.close_connection = True
                logging.info("leankv: a client has left")
            except Exception as error:
                said = line(f"the request cannot be used: {type(error).__name__}: {error}")
                text = described(error) if status == 500 else said
                logging.error(f"leankv: error: {text}")
                try:
                    self._fail(text, status)
                except OSError:
                    self.close_connection = True

        def _fail(self, text: str, status: int) -> None:
            if not self._begun:
                self._headers_buffer: list[bytes] = []  # of an answer that does not come
                self._reply(status, {"error": text})
            elif self.stream:
                self.wfile.write(f"data: {json.dumps({'error': {'message': text}})}\n\n".encode())
                self.wfile.flush()

        def _reply(self, status: int, content: Any) -> None:
            self._set_completion_headers(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())
            self.wfile.flush()

    return APIHandler


class _ForClient:
    """The generator as the handler of one connection asks it."""

    def __init__(self, generator: Any, client: Client, refuse: Callable[[Exception], None]) -> None:
        self._generator, self._client, self._refuse = generator, client, refuse
        self.cli_args = generator.cli_args

    def generate(self, request: Any, args: Any, progress_callback: Any = None) -> Any:
        """mlx-lm's `ResponseGenerator.generate`; a refusal is noted before it is raised."""
        try:
            return self._generator.generate(request, args, progress_callback, self._client)
        except Exception as error:
            self._refuse(error)
            raise
