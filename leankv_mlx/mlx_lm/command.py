"""mlx-lm's own commands with one more flag, `--kv`.

Nothing of mlx-lm is copied: a `main` runs as it is, with the names that it looks up in its own
module replaced for the time of the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.config import UNCOMPRESSED, CompressionConfig, parse_kv
from leankv_mlx.errors import CacheFileError, UsageError
from leankv_mlx.kernels import resolve_backend
from leankv_mlx.mlx_lm.attachment import Attachment, attach
from leankv_mlx.mlx_lm.cache_files import (
    PromptCache,
    has_magic,
    load_prompt_cache,
    save_prompt_cache,
)
from leankv_mlx.mlx_lm.document_prompt import DocumentPrompt, Documents
from leankv_mlx.mlx_lm.flags import add_flags
from leankv_mlx.mlx_lm.loading import (
    LoadedModel,
    check_context,
    fingerprint,
    load_from,
    resolve_model,
)
from leankv_mlx.mlx_lm.loops import telling
from leankv_mlx.mlx_lm.patches import printing, replaced
from leankv_mlx.mlx_lm.precision import compute_in_float32
from leankv_mlx.mlx_lm.usage import Usage, measure, summary_line
from leankv_mlx.resources import demo_model

BARE = "leankv"
_COMPRESSED = CompressedKVCache.__name__
_FINGERPRINT = "leankv_model"
_IDLE_BESIDE_KV = {"kv_bits": "--kv-bits", "max_kv_size": "--max-kv-size"}
"""Flags of mlx-lm that would do nothing, because attach decides which caches there are."""


class Session:
    """One run of a command of mlx-lm: what was loaded, attached and cached in it.

    Args:
        command: its name, for example "generate".
        prog: what the user typed, for messages.
        demo: without `--model` the command runs on the bundled demo model.
        document: what stands for the flag `--file`, if the command has it.
    """

    def __init__(
        self, command: str, prog: str, demo: bool = False, document: DocumentPrompt | None = None
    ) -> None:
        self.command = command
        self.prog = prog
        self.demo = demo
        self.document = document
        self.config: CompressionConfig | None = None
        self.main_model: LoadedModel | None = None
        self.attachments: list[Attachment] = []
        self.caches: list[list[Any]] = []
        self._args = argparse.Namespace()
        self._loaded: PromptCache | None = None
        self._fingerprint = ""
        self._serving = UNCOMPRESSED
        self._undo = ExitStack()

    # Before the run: the flags.

    def prepare(self, parser: argparse.ArgumentParser, default_kv: str) -> None:
        """Add `--kv` to a parser of mlx-lm, and our checks to its `parse_args`."""
        add_flags(parser, default_kv, self.demo, file=self.document is not None)
        if self.document is not None:
            self.document.prepare(parser)
        original = parser.parse_args

        def parse_args(*args: Any, **kwargs: Any) -> Any:
            return self.accept(original(*args, **kwargs))

        def error(message: str) -> NoReturn:
            raise UsageError(f"{message}; see {self.prog} --help.")

        vars(parser).update(parse_args=parse_args, error=error)

    def accept(self, args: argparse.Namespace) -> argparse.Namespace:
        """Read `--kv` and check the flags that it has to do with.

        Raises:
            UsageError: the flags contradict each other or are not understood.
        """
        self._args = args
        self.config = parse_kv(args.kv)
        if self.config is not None:
            resolve_backend(self.config.backend)
            for name, flag in _IDLE_BESIDE_KV.items():
                if getattr(args, name, None) is not None:
                    raise UsageError(
                        f"{flag} does nothing beside --kv {args.kv}; "
                        f"drop it, or use --kv {UNCOMPRESSED}."
                    )
        check = {
            "benchmark": self._accept_benchmark,
            "cache_prompt": self._accept_cache_prompt,
            "generate": self._accept_generate,
            "server": self._accept_server,
        }.get(self.command)
        if check is not None:
            check(args)
        return args

    def _accept_benchmark(self, args: argparse.Namespace) -> None:
        if self.config is not None and args.batch_size != 1:
            raise UsageError(
                f"--batch-size {args.batch_size} does not work with --kv {args.kv}: a compressed "
                f"cache holds one sequence; use --batch-size 1, or --kv {UNCOMPRESSED}."
            )

    def _accept_cache_prompt(self, args: argparse.Namespace) -> None:
        target = Path(args.prompt_cache_file)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise UsageError(f"cannot write {target}; name a file in a folder that exists.")

    def _accept_generate(self, args: argparse.Namespace) -> None:
        if self.document is not None:
            self.document.accept(args, self._undo)
        if args.max_tokens == 0:
            raise UsageError("--max-tokens 0 asks for nothing; use -1 for no limit.")
        file = args.prompt_cache_file
        if file is None:
            if args.model is None and self.demo:
                args.model = str(demo_model())
            return
        if not Path(file).is_file():
            raise UsageError(f"no prompt cache file {file}; make one with mlx_lm.cache_prompt.")
        if self.config is not None and args.draft_model is not None:
            raise UsageError(
                "--draft-model needs a cache of its own and a prompt cache file holds none; "
                "drop --draft-model or --prompt-cache-file."
            )

    def _accept_server(self, args: argparse.Namespace) -> None:
        # The server loads its models in a thread, where an error would only stop the thread.
        for name in filter(None, (args.model, args.draft_model)):
            resolve_model(name)

    # During the run: what stands in for functions that mlx-lm's commands call.

    @property
    def methods(self) -> dict[str, Callable[..., Any]]:
        """Name in the command's module -> what is called instead, with the original first."""
        loading: dict[str, Callable[..., Any]] = {
            "load": self.load,
            "sharded_load": self.sharded_load,
        }
        own: dict[str, dict[str, Callable[..., Any]]] = {
            "cache_prompt": {
                "generate_step": self.generate_step,
                "make_prompt_cache": self.make_prompt_cache,
                "save_prompt_cache": self.save_prompt_cache,
            },
            "chat": {"make_prompt_cache": self.make_prompt_cache},
            "server": {"stream_generate": self.stream_generate},
            "generate": {
                "generate": self.generate,
                "load_prompt_cache": self.load_prompt_cache,
                "make_prompt_cache": self.make_prompt_cache,
            },
        }
        return loading | own.get(self.command, {})

    def load(self, original: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        """mlx-lm's `load`, with our errors; the model comes back attached."""
        with_config = options.pop("return_config", False)
        path = resolve_model(name)
        loaded = load_from(lambda p, **o: original(p, *args, **o), path, **options)
        self._attach(loaded.model)
        if self.main_model is None:  # the draft model comes second
            self.main_model = LoadedModel(*loaded, path)
            self._fingerprint = fingerprint(path)
            self._check_fit(name)
            if self.document is not None:
                self.document.check_length(self.main_model)
        return loaded if with_config else loaded[:2]

    def sharded_load(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """mlx-lm's `sharded_load`, for one of several machines."""
        loaded = original(*args, **options)
        compute_in_float32(loaded[0])
        self._attach(loaded[0])
        return loaded

    @property
    def _context(self) -> dict[str, Any]:
        return self.main_model.config if self.main_model else {}

    def _attach(self, model: Any) -> None:
        if self.config is None:
            return
        attachment = attach(model, self.config).start()
        if self.command != "server":
            self.attachments.append(attachment)
            return
        # A server may drop a model for another; its attachment then goes with it.
        self._serving = _backend_of(attachment)
        logging.info(
            f"leankv: {self.config.spec()}, {attachment.compressed_layers} of "
            f"{len(attachment.report)} layers compressed, backend {self._serving}"
        )

    def _check_fit(self, name: str) -> None:
        """A prompt cache file goes with the model that it was made with."""
        if self._loaded is None or self.config is None:
            return
        made_with = self._loaded.metadata.get(_FINGERPRINT, self._fingerprint)
        rows = self.attachments[0].report
        expected = [_COMPRESSED if row.compressed else row.cache for row in rows]
        found = [type(cache).__name__ for cache in self._loaded.caches]
        if made_with != self._fingerprint or expected != found:
            raise CacheFileError(
                f"{self._args.prompt_cache_file} was made with another model than {name} is now; "
                "make it anew with mlx_lm.cache_prompt."
            )

    def generate(
        self, original: Callable[..., Any], model: Any, tokenizer: Any, prompt: Any, **options: Any
    ) -> Any:
        """mlx-lm's `generate`, within the model's context."""
        given = options.get("prompt_cache")
        past = measure(given or []).tokens
        wanted = options.get("max_tokens", -1)
        options["max_tokens"] = check_context(self._context, past + len(prompt), wanted)
        if self.document and self.main_model:
            opened = self.document.opened(self.main_model, self.config, prompt)
            if opened is not None:
                given, prompt = opened
                options["prompt_cache"] = given
        if given is not None:
            self.caches.append(given)
        return original(model, tokenizer, prompt, **options)

    def generate_step(
        self, original: Callable[..., Any], prompt: Any, *args: Any, **options: Any
    ) -> Any:
        """mlx-lm's `generate_step`, within the model's context."""
        check_context(self._context, len(prompt), -1)
        return telling(original)(prompt, *args, **options)

    def stream_generate(
        self, original: Callable[..., Any], *args: Any, prompt_cache: Any, **options: Any
    ) -> Iterator[Any]:
        """mlx-lm's `stream_generate` in its server; the log gets a line for each request."""
        try:
            yield from original(*args, prompt_cache=prompt_cache, **options)
        finally:
            logging.info(summary_line(measure(prompt_cache), self._serving))

    def make_prompt_cache(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """mlx-lm's `make_prompt_cache`; the list is kept, so that its bytes can be counted."""
        made = original(*args, **options)
        if self.command == "chat":  # a conversation that was reset counts no more
            self.caches.clear()
        self.caches.append(made)
        return made

    def save_prompt_cache(
        self, original: Callable[..., Any], file: str, cache: list[Any], metadata: dict[str, str]
    ) -> Any:
        """mlx-lm's `save_prompt_cache`; compressed caches go into a file of our own format."""
        if self.config is None:
            return original(file, cache, metadata)
        return save_prompt_cache(file, cache, metadata | {_FINGERPRINT: self._fingerprint})

    def load_prompt_cache(
        self, original: Callable[..., Any], file: str, return_metadata: bool = False
    ) -> Any:
        """mlx-lm's `load_prompt_cache` for files of either format, each with its `--kv`."""
        if self.config is None:
            if has_magic(file):
                raise UsageError(f"{file} holds a compressed cache; use --kv {BARE}.")
            return original(file, return_metadata=return_metadata)
        if not has_magic(file):
            raise UsageError(
                f"{file} holds no compressed cache; use --kv {UNCOMPRESSED}, "
                f"or make it anew with mlx_lm.cache_prompt --kv {BARE}."
            )
        loaded = self._loaded = load_prompt_cache(file, self.config.backend)
        self._take_format(file, loaded)
        self._check_metadata(file, loaded.metadata)
        return (loaded.caches, loaded.metadata) if return_metadata else loaded.caches

    def _take_format(self, file: str, loaded: PromptCache) -> None:
        """A bare `--kv` stands for the format of the file."""
        assert self.config is not None
        for config in loaded.configs:
            config = replace(config, backend=self.config.backend)
            if self._args.kv == BARE:
                self.config = config
            elif config != self.config:
                raise UsageError(
                    f"{file} holds {config.spec()}, not {self._args.kv}; use --kv {BARE}."
                )

    def _check_metadata(self, file: str, metadata: dict[str, str]) -> None:
        """What mlx-lm's command reads from it: the model's name and how its tokenizer was made."""
        try:
            name, tokenizer = metadata["model"], json.loads(metadata["tokenizer_config"])
        except (KeyError, ValueError, RecursionError):
            name, tokenizer = "", None
        if not name or not isinstance(tokenizer, dict):
            raise CacheFileError(
                f"{file} does not say which model it belongs to; "
                f"make it with mlx_lm.cache_prompt --kv {BARE}."
            )
        wanted = self._args.model
        if wanted is None or wanted == name:
            return
        if fingerprint(resolve_model(wanted)) != metadata.get(_FINGERPRINT):
            raise UsageError(f"{file} was made with {name}, not with {wanted}; drop --model.")
        metadata["model"] = wanted  # the same model by another name

    # After the run.

    def close(self) -> None:
        """Detach every model."""
        self._undo.close()
        for attachment in reversed(self.attachments):
            attachment.stop()

    def summary(self) -> str | None:
        """The line that ends a run; None if it made no cache."""
        caches = self.caches or [attachment.caches for attachment in self.attachments]
        if not any(caches):
            return None
        return summary_line(sum(map(measure, caches), Usage()), self._backend())

    def _backend(self) -> str:
        return _backend_of(self.attachments[0]) if self.attachments else UNCOMPRESSED


def _backend_of(attachment: Attachment) -> str:
    """For messages."""
    if attachment.compressed_layers:
        return attachment.backend
    reasons = dict.fromkeys(row.reason for row in attachment.report)
    return f"{UNCOMPRESSED} (nothing to compress: {'; '.join(reasons)})"


Guard = Callable[[Callable[[], Any]], Any]
"""Calls a function and decides what becomes of the errors that it raises."""


@contextmanager
def hooked(
    module: ModuleType, session: Session, guard: Guard = lambda call: call()
) -> Iterator[None]:
    """A module that runs a command of mlx-lm, with the session's functions; restored on exit."""

    def bound(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: guard(lambda: method(original, *args, **options))

    with ExitStack() as stack:
        stack.callback(session.close)
        stack.enter_context(printing(module))
        for name, method in session.methods.items():
            if (original := getattr(module, name, None)) is not None:
                stack.enter_context(replaced(module, name, bound(method, original)))
        yield


def run_generate(
    arguments: Sequence[str],
    prog: str = "leankv generate",
    default_kv: str = BARE,
    documents: Documents | None = None,
) -> None:
    """Run mlx-lm's `generate` command; the summary goes to stderr.

    Args:
        documents: what reads them; with it, there is a flag `--file`.

    Raises:
        LeanKVError: anything that the caller can put right.
    """
    module = import_module("mlx_lm.generate")
    document = DocumentPrompt(documents) if documents is not None else None
    session = Session("generate", prog, demo=True, document=document)

    def setup_arg_parser(original: Callable[[], argparse.ArgumentParser]) -> Any:
        parser = original()
        session.prepare(parser, default_kv)
        return parser

    setup = partial(setup_arg_parser, module.setup_arg_parser)
    with (
        hooked(module, session),
        replaced(module, "setup_arg_parser", setup),
        replaced(sys, "argv", [prog, *arguments]),
    ):
        module.main()
        print_summary(session)


def print_summary(session: Session) -> None:
    """After the output of the run, on stderr."""
    summary = session.summary()
    sys.stdout.flush()
    if summary is not None:
        print(summary, file=sys.stderr)
