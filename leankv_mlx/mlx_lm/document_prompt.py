"""`--file` for mlx-lm's `generate`: a document in front of the prompt, in a cache of its own.

mlx-lm builds the prompt as ever; the message comes to it by its own `--prompt -`. What the document
is in tokens is found in the same way, so its caches can be opened instead of read.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.mlx_lm import prompts
from leankv_mlx.mlx_lm.context import longest_context
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.patches import replaced

_INSTEAD = {
    "draft_model": "--draft-model",
    "image": "--image",
    "max_kv_size": "--max-kv-size",
    "prompt_cache_file": "--prompt-cache-file",
}
"""Flags that bring a prompt or a cache of their own."""
_OTHER_WEIGHTS = ("adapter_path", "quantize_activations")
"""Flags that change what a model computes, so that its folder does not tell."""


class Documents(Protocol):
    """What reads and opens documents; it lives above this layer."""

    def read(self, source: str) -> tuple[str, str]:
        """The name of a document, and what a message about it begins with."""

    def open(
        self,
        loaded: LoadedModel,
        config: CompressionConfig | None,
        prefix: Sequence[int],
        name: str,
        keep: bool,
    ) -> list[Any]:
        """Caches that hold `prefix`; `keep` says whether a file may stand for them."""


class DocumentPrompt:
    """The flag of one run, and what becomes of it."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._args = argparse.Namespace(file=None)
        self._prompt = ""
        self._name = self._head = ""

    def prepare(self, parser: argparse.ArgumentParser) -> None:
        """Read `--prompt` of mlx-lm's parser ourselves."""
        self._prompt = parser.get_default("prompt")
        parser.set_defaults(prompt=None)

    def accept(self, args: argparse.Namespace, undo: ExitStack) -> None:
        """Read the document, if there is one, and put it in front of the prompt.

        Args:
            undo: gets what has to be restored after the run.

        Raises:
            UsageError: other flags contradict it.
            DocumentError: it cannot be read.
        """
        self._args = args
        if args.file is None:
            args.prompt = self._prompt if args.prompt is None else args.prompt
            return
        for name, flag in _INSTEAD.items():
            if getattr(args, name, None):
                raise UsageError(f"{flag} does not go with --file; drop one of them.")
        if args.prompt is None:
            raise UsageError("say what to do with the file: --prompt QUESTION.")
        self._name, self._head = self._documents.read(args.file)
        # As mlx-lm does, but not to the document: there a backslash is a backslash.
        question = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
        question = sys.stdin.read() if question == "-" else question
        args.prompt = "-"
        undo.enter_context(replaced(sys, "stdin", io.StringIO(self._head + question)))

    def check_length(self, loaded: LoadedModel) -> None:
        """Refuse a document that is far too long, before mlx-lm makes tokens of all of it.

        Raises:
            ContextLengthError: it does not fit the model's context.
        """
        prompts.check_length(loaded.tokenizer, self._head, longest_context(loaded.config))

    def opened(
        self, loaded: LoadedModel, config: CompressionConfig | None, prompt: list[int]
    ) -> tuple[list[Any], list[int]] | None:
        """Caches that hold the document, and the rest of the prompt; None without a document."""
        if self._args.file is None:
            return None
        prefix = prompts.beginning(lambda text: self._tokens(loaded.tokenizer, text), self._head)
        held = prompts.shared(prefix, prompt[:-1])
        keep = not any(getattr(self._args, name, None) for name in _OTHER_WEIGHTS)
        caches = self._documents.open(loaded, config, prompt[:held], self._name, keep)
        return caches, prompt[held:]

    def _tokens(self, tokenizer: Any, text: str) -> list[int]:
        """The whole prompt for a message, as mlx-lm makes it."""
        args = self._args
        if args.ignore_chat_template or not tokenizer.has_chat_template:
            tokens: list[int] = tokenizer.encode(text)
            return tokens
        system = [] if args.system_prompt is None else [("system", args.system_prompt)]
        messages = [{"role": role, "content": said} for role, said in [*system, ("user", text)]]
        template = json.loads(args.chat_template_config or "{}")
        return prompts.encode(tokenizer, prompts.render(tokenizer, messages, **template))
