"""`mlx_lm.generate` with `--kv`, and as `leankv generate` with `--file` and the bundled model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.codec.space import Learned
from leankv_mlx.config import UNCOMPRESSED
from leankv_mlx.errors import CacheFileError, UsageError
from leankv_mlx.mlx_lm.cache_files import PromptCache, has_magic, load_prompt_cache
from leankv_mlx.mlx_lm.commands.session import (
    BARE,
    FINGERPRINT,
    Method,
    Session,
    hooked,
    print_summary,
)
from leankv_mlx.mlx_lm.document_prompt import DocumentPrompt, Documents
from leankv_mlx.mlx_lm.flags import add_flags
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context, fingerprint, resolve_model
from leankv_mlx.mlx_lm.patches import replaced
from leankv_mlx.mlx_lm.usage import measure
from leankv_mlx.resources import demo_model

_COMPRESSED = CompressedKVCache.__name__


class Generate(Session):
    """One run of it.

    Args:
        demo: without `--model` the command runs on the bundled demo model.
        document: what stands for the flag `--file`, if the command has it.
    """

    def __init__(
        self, prog: str, demo: bool = False, document: DocumentPrompt | None = None
    ) -> None:
        super().__init__(prog)
        self._demo = demo
        self._document = document
        self._loaded: PromptCache | None = None
        self._undo = ExitStack()

    def add_flags(self, parser: argparse.ArgumentParser, default_kv: str) -> None:
        """See `Session`."""
        add_flags(parser, default_kv, self._demo, file=self._document is not None)
        if self._document is not None:
            self._document.prepare(parser)

    def accept(self, args: argparse.Namespace) -> None:
        """Also the flags of a document and of a prompt cache file."""
        super().accept(args)
        if self._document is not None:
            self._document.accept(args, self._undo)
        if args.max_tokens == 0:
            raise UsageError("--max-tokens 0 asks for nothing; use -1 for no limit.")
        file = args.prompt_cache_file
        if file is None:
            if args.model is None and self._demo:
                args.model = str(demo_model())
            return
        if not Path(file).is_file():
            raise UsageError(f"no prompt cache file {file}; make one with mlx_lm.cache_prompt.")
        if self.config is not None and args.draft_model is not None:
            raise UsageError(
                "--draft-model needs a cache of its own and a prompt cache file holds none; "
                "drop --draft-model or --prompt-cache-file."
            )

    @property
    def methods(self) -> dict[str, Method]:
        """See `Session`."""
        return super().methods | {
            "generate": self.generate,
            "load_prompt_cache": self.load_prompt_cache,
            "make_prompt_cache": self.make_prompt_cache,
        }

    def check_model(self, name: str, loaded: LoadedModel) -> None:
        """A prompt cache file and a document have to fit it."""
        self._check_fit(name)
        if self._document is not None:
            self._document.check_length(loaded)

    def generate(
        self, original: Callable[..., Any], model: Any, tokenizer: Any, prompt: Any, **options: Any
    ) -> Any:
        """mlx-lm's `generate`, within the model's context."""
        given = options.get("prompt_cache")
        past = measure(given or []).tokens
        wanted = options.get("max_tokens", -1)
        options["max_tokens"] = check_context(self.context, past + len(prompt), wanted)
        if self._document and self.main_model:
            config = self.attachments[0].config if self.attachments else None
            opened = self._document.opened(self.main_model, config, prompt)
            if opened is not None:
                given, prompt = opened
                options["prompt_cache"] = given
        if given is not None:
            self.caches.append(given)
        return original(model, tokenizer, prompt, **options)

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
            ours = self.config
            config = replace(
                config,
                backend=ours.backend,
                projections=ours.projections,
                sparse=ours.sparse,
            )
            for name in ("mask", "basis"):
                named, stored = getattr(ours, name), getattr(config, name)
                if not named.digest and named.name == stored.name:  # the file has its own
                    ours = self.config = replace(ours, **{name: stored})
            if self.args.kv == BARE:
                self.config = config
            elif config != ours:
                raise UsageError(
                    f"{file} holds {config.spec()}, not {self.args.kv}; use --kv {BARE}."
                )

    @property
    def learned(self) -> list[Learned] | None:
        """See `Session`; a file has it with it."""
        caches = self._loaded.caches if self._loaded else []
        found = [c.learned for c in caches if isinstance(c, CompressedKVCache)]
        return [learned for learned in found if learned] or None

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
        wanted = self.args.model
        if wanted is None or wanted == name:
            return
        if fingerprint(resolve_model(wanted)) != metadata.get(FINGERPRINT):
            raise UsageError(f"{file} was made with {name}, not with {wanted}; drop --model.")
        metadata["model"] = wanted  # the same model by another name

    def _check_fit(self, name: str) -> None:
        """A prompt cache file goes with the model that it was made with."""
        if self._loaded is None or self.config is None:
            return
        made_with = self._loaded.metadata.get(FINGERPRINT, self.fingerprint)
        rows = self.attachments[0].report
        expected = [_COMPRESSED if row.compressed else row.cache for row in rows]
        found = [type(cache).__name__ for cache in self._loaded.caches]
        if made_with != self.fingerprint or expected != found:
            raise CacheFileError(
                f"{self.args.prompt_cache_file} was made with another model than {name} is now; "
                "make it anew with mlx_lm.cache_prompt."
            )

    def close(self) -> None:
        """See `Session`; a document's prompt is taken back first."""
        self._undo.close()
        super().close()


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
    session = Generate(prog, demo=True, document=document)

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
