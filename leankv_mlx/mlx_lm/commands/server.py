"""`mlx_lm.server` with `--kv`, and as `leankv serve` with the bundled model."""

from __future__ import annotations

import argparse
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from leankv_mlx.config import UNCOMPRESSED
from leankv_mlx.errors import LeanKVError, ModelError, UsageError
from leankv_mlx.faults import described
from leankv_mlx.folders import expanded
from leankv_mlx.mlx_lm.attachment import Attachment
from leankv_mlx.mlx_lm.commands.session import BARE, Method, Session, backend_text, hooked
from leankv_mlx.mlx_lm.context import longest_context
from leankv_mlx.mlx_lm.flags import add_flags, add_serving_flags
from leankv_mlx.mlx_lm.loading import resolve_model
from leankv_mlx.mlx_lm.patches import replaced
from leankv_mlx.mlx_lm.serving.generator import generator_of
from leankv_mlx.mlx_lm.serving.handler import handler_of
from leankv_mlx.mlx_lm.serving.served import Served
from leankv_mlx.mlx_lm.stored_prompts import disk_store
from leankv_mlx.mlx_lm.usage import measure, summary_line
from leankv_mlx.resources import demo_model
from leankv_mlx.serving import PromptStore
from leankv_mlx.serving.prefixes import Prefixes
from leankv_mlx.sizes import parse_bytes

_OURS = {"kv_memory": "--kv-memory", "kv_store": "--kv-store", "kv_store_size": "--kv-store-size"}
_DEFAULT_STORE = "on"
_EXAMPLE_TOKENS = 4096
"""Of the sequences that the start line counts."""


class Server(Session):
    """One run of it.

    Args:
        demo: without `--model` it answers with the bundled demo model.
    """

    def __init__(self, prog: str, demo: bool = False) -> None:
        super().__init__(prog)
        self._demo = demo
        self._backend = UNCOMPRESSED  # of the model that is served
        self._attached: list[weakref.ref[Attachment]] = []
        self._limit: int | None = None
        self._store_limit: int | None = None

    def add_flags(self, parser: argparse.ArgumentParser, default_kv: str) -> None:
        """Also what bounds and keeps the caches."""
        add_flags(parser, default_kv, self._demo)
        add_serving_flags(parser, short=self._demo)
        for action in parser._actions:
            if action.dest == "prompt_cache_bytes":
                action.type = parse_bytes

    def accept(self, args: argparse.Namespace) -> None:
        """Also find the models now: the server loads them in a thread.

        Raises:
            UsageError, ModelError: a flag or a model is not understood.
        """
        super().accept(args)
        if args.model is None and self._demo:
            args.model = str(demo_model())
        for name in filter(None, (args.model, args.draft_model)):
            resolve_model(name)
        self._accept_ours(args)

    def _accept_ours(self, args: argparse.Namespace) -> None:
        given = [flag for name, flag in _OURS.items() if getattr(args, name) is not None]
        if given and self.config is None:
            raise UsageError(f"{given[0]} does nothing beside --kv {args.kv}; use --kv {BARE}.")
        if args.kv_store_size is not None:
            if args.kv_store is None:
                raise UsageError("--kv-store-size does nothing without --kv-store.")
            self._store_limit = parse_bytes(args.kv_store_size)
        if args.kv_store not in (None, _DEFAULT_STORE):
            place = expanded(args.kv_store)
            if place.exists() and not place.is_dir():
                raise UsageError(f"--kv-store {place} is a file; give a folder.")
        if args.kv_memory is not None:
            self._limit = parse_bytes(args.kv_memory)
            if not self._limit:
                raise UsageError("--kv-memory 0 leaves no room for any request.")
        for flag in ("decode_concurrency", "prompt_concurrency", "prefill_step_size"):
            if self.config is not None and getattr(args, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} must be at least 1.")

    @property
    def methods(self) -> dict[str, Method]:
        """See `Session`."""
        return super().methods | {
            "stream_generate": self.stream_generate,
            "LRUPromptCache": self.prompt_store,
            "ResponseGenerator": self.response_generator,
            "_run_http_server": self.run_http_server,
            "scan_cache_dir": self.scan_cache_dir,
        }

    # Models.

    def load(self, original: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        """See `Session`; a server may drop a model for another, so none is held here."""
        self._drafting = not options.get("return_config", False)
        loaded = super().load(original, name, *args, **options)
        if not self._drafting:
            self._model_config = loaded[2]
        self.main_model = None
        return loaded

    def is_draft(self, name: str) -> bool:
        """See `Session`."""
        return self._drafting

    def sharded_load(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """See `Session`."""
        loaded = super().sharded_load(original, *args, **options)
        self._model_config = loaded[2]
        return loaded

    def keep(self, attachment: Attachment) -> None:
        """The attachment goes with its model."""
        self._attached = [ref for ref in self._attached if ref() is not None]
        self._attached.append(weakref.ref(attachment))
        self._backend = backend_text(attachment)
        logging.info(
            f"leankv: {attachment.config.spec()}, {attachment.compressed_layers} of "
            f"{len(attachment.report)} layers compressed, backend {self._backend}"
        )

    def _served(self, name: Any, provider: Any) -> Served:
        alive = [found for ref in self._attached if (found := ref()) is not None]
        models = [m for m in (provider.model, provider.draft_model) if m is not None]
        attachments = [next(a for a in reversed(alive) if a.model is model) for model in models]
        return Served.of(
            name,
            provider,
            self._model_config,
            tuple(attachments),
            self._limit,
            self._disk(provider, attachments[0]),
        )

    def _disk(self, provider: Any, attachment: Attachment) -> Prefixes | None:
        """Where prefixes are kept: of models with an adapter or a draft none are."""
        name, adapter, draft = provider.model_key
        args = self.args
        if args.kv_store is None or adapter is not None or draft is not None:
            return None
        return disk_store(
            provider.model,
            resolve_model(name),
            attachment.config,
            None if args.kv_store == _DEFAULT_STORE else expanded(args.kv_store),
            self._store_limit,
            lambda text: logging.info(f"leankv: {text}"),
            args.prefill_step_size,
        )

    # The parts of the server.

    def prompt_store(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Instead of mlx-lm's `LRUPromptCache`."""
        return original(*args, **options) if self.config is None else PromptStore(*args, **options)

    def response_generator(self, original: Any, *args: Any, **options: Any) -> Any:
        """Instead of mlx-lm's `ResponseGenerator`."""
        if self.config is None:
            return original(*args, **options)
        if self.args.kv_store is not None and mx.distributed.init().size() > 1:
            raise UsageError("--kv-store works on one machine; drop it, or serve on one.")
        return generator_of(original, self._served, self._summary_of)(*args, **options)

    def run_http_server(
        self, original: Callable[..., Any], host: str, port: int, generator: Any, **options: Any
    ) -> None:
        """mlx-lm's `_run_http_server`, once the model is there.

        Raises:
            ModelError: it cannot be loaded.
            UsageError: the address is taken, or none of this machine's.
        """
        if self.config is None:
            original(host, port, generator, **options)
            return
        try:
            generator.wait()
            logging.info(self._start_line(generator.served, host, port))
            handler = handler_of(generator.server.APIHandler)
            original(host, port, generator, server_class=_Listening, handler_class=handler)
        except OSError as error:
            raise UsageError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another --port."
            ) from error
        except LeanKVError:
            raise
        except Exception as error:
            raise ModelError(f"the server could not start: {described(error)}") from error
        finally:
            generator.stop_and_join()

    def _start_line(self, served: Served | None, host: str, port: int) -> str:
        """What fits, and where to ask."""
        parts = ["the model of the first request"]
        if served is not None:
            tokens = min(_EXAMPLE_TOKENS, longest_context(served.config))
            fit, uncompressed = served.sequences(tokens)
            parts = [
                resolve_model(served.facts["model"]).name,
                served.facts["setting"],
                f"{_size(served.limit)} of KV: about {fit:,} sequences of {tokens:,} tokens "
                f"({uncompressed:,} uncompressed)",
            ]
        return f"{self.prog}: {', '.join(parts)}; http://{host}:{port}/v1"

    def scan_cache_dir(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The hub's, for the list of models, where nothing was ever downloaded."""
        from huggingface_hub.errors import CacheNotFound

        try:
            return original(*args, **options)
        except CacheNotFound:
            return SimpleNamespace(repos=())

    def stream_generate(
        self, original: Callable[..., Any], *args: Any, prompt_cache: Any, **options: Any
    ) -> Iterator[Any]:
        """mlx-lm's `stream_generate`, for requests that are answered by themselves; the log gets a
        line for each."""
        try:
            yield from original(*args, prompt_cache=prompt_cache, **options)
        finally:
            logging.info(self._summary_of(prompt_cache))

    def _summary_of(self, caches: list[Any]) -> str:
        return summary_line(measure(caches), self._backend)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


class _Listening(ThreadingHTTPServer):
    """Many clients may come at once, and none of them ends more than its own connection."""

    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # which is a client that has left
            logging.error(f"leankv: error: {described(error or Exception())}")


def run_serve(arguments: Sequence[str], prog: str = "leankv serve", default_kv: str = BARE) -> None:
    """Run mlx-lm's `server` command until Ctrl+C.

    Raises:
        LeanKVError: anything that the caller can put right.
    """
    module = import_module("mlx_lm.server")
    session = Server(prog, demo=True)

    def parser(**options: Any) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(**options | {"prog": prog})

        def parse_args(*words: Any, **more: Any) -> Any:
            del made.parse_args
            session.prepare(made, default_kv)  # once all of mlx-lm's flags are there
            return made.parse_args(*words, **more)

        vars(made)["parse_args"] = parse_args
        return made

    with ExitStack() as stack:
        stack.enter_context(hooked(module, session))
        stack.enter_context(replaced(module, "argparse", SimpleNamespace(ArgumentParser=parser)))
        stack.enter_context(replaced(sys, "argv", [prog, *arguments]))
        module.main()
