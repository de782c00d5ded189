"""Answering from documents: one model, its caches, and the memory they may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.documents.readers import document_head
from leankv_mlx.errors import ContextLengthError
from leankv_mlx.mlx_lm import prompts
from leankv_mlx.mlx_lm.attachment import Attachment, attach, backend_of
from leankv_mlx.mlx_lm.context import longest_context
from leankv_mlx.mlx_lm.footprint import Footprint, spare_memory
from leankv_mlx.mlx_lm.loading import LoadedModel, load
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK, Progress
from leankv_mlx.mlx_lm.usage import Usage, measure


@dataclass
class Answer:
    """One reply, complete once its pieces were taken.

    Attributes:
        text: what was said so far.
        prompt_tokens: document and question.
        document_tokens: those of the prefix that was opened or read by itself.
        tokens: of the reply.
        cached: whether the document came from its file.
        first_token_s: from the prompt to the first token.
        decode_s: from then on.
        usage: bytes of the caches at the end.
        document_usage: bytes of the caches when they held the document alone.
        complete: the model ended it itself.
    """

    text: str = ""
    prompt_tokens: int = 0
    document_tokens: int = 0
    tokens: int = 0
    cached: bool = False
    first_token_s: float = 0.0
    decode_s: float = 0.0
    usage: Usage = field(default_factory=Usage)
    document_usage: Usage = field(default_factory=Usage)
    complete: bool = False

    @property
    def speed(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / self.decode_s if self.decode_s and self.tokens > 1 else 0.0


class Reader:
    """Use it as a context manager; the model is given back at the end.

    Attributes:
        config: as the attachment has it; None for the uncompressed cache.
        budget: bytes that the KV cache may take.
        context: tokens that the model was made for.
        footprint: what caches take.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: CompressionConfig | None,
        budget: int = 0,
        store: DocumentCache | None = None,
    ) -> None:
        """A budget of 0 is what the machine has to spare."""
        self.loaded = loaded
        self.attachment: Attachment | None = attach(loaded.model, config) if config else None
        self.config = self.attachment.config if self.attachment else None
        self.footprint = Footprint.of(loaded.model, self.attachment)
        self.budget = budget or spare_memory(loaded.model)
        self.context = longest_context(loaded.config)
        self._opener = Opener(loaded, self.config, store)

    def __enter__(self) -> Reader:
        if self.attachment is not None:
            self.attachment.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.attachment is not None:
            self.attachment.stop()

    @property
    def backend(self) -> str:
        """What runs the kernels, "none" without compression."""
        return backend_of(self.attachment)

    @property
    def weights_read(self) -> float:
        """Share of the layers' weights that the last step read."""
        return self.attachment.weights_read if self.attachment else 1.0

    @property
    def longest(self) -> int:
        """Tokens of prompt and reply that fit the model and the budget."""
        return self.footprint.longest(self.budget, self.context)

    def prompt(self, text: str) -> list[int]:
        """The tokens of a message."""
        rendered = prompts.render(self.loaded.tokenizer, [{"role": "user", "content": text}])
        return prompts.encode(self.loaded.tokenizer, rendered)

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return prompts.count(self.loaded.tokenizer, text)

    def prompt_tokens(self, text: str) -> int:
        """Tokens of a message; an estimate if they are more than fit."""
        about = self._estimate(text)
        return len(self.prompt(text)) if about is None else about

    def _estimate(self, text: str) -> int | None:
        return prompts.estimate(self.loaded.tokenizer, text, self.longest)

    def check(self, tokens: int, max_tokens: int, about: str = "") -> int:
        """How long a reply to a prompt may be, at most `max_tokens`.

        Args:
            about: "about " if `tokens` is an estimate.

        Raises:
            ContextLengthError: there is no room for a reply.
        """
        room = self.longest - tokens
        if room > 0:
            return min(room, max_tokens)
        if tokens >= self.context:
            raise ContextLengthError(
                f"the document has {about}{tokens} tokens and the model's context {self.context}; "
                "summarize it with leankv-summarize, or use a model with a longer context."
            )
        raise ContextLengthError(
            f"the document needs {self.footprint.used(tokens) / 1e6:.1f} MB of KV cache and the "
            f"budget is {self.budget / 1e6:.1f} MB; raise --memory-budget, or use fewer bits "
            "(--kv leankv:k3v3)."
        )

    def answer(
        self,
        document: str,
        question: str,
        max_tokens: int,
        name: str = "",
        progress: Progress = lambda done, total: None,
    ) -> tuple[Answer, Iterator[str]]:
        """A reply and its pieces as they come.

        Args:
            name: what to call the document where it is kept; "" keeps nothing of it.

        Raises:
            ContextLengthError: document and question do not fit.
        """
        head = document_head(document)
        start = time.perf_counter()
        if (about := self._estimate(head)) is not None:
            self.check(about, max_tokens, "about ")  # raises, before the tokens take the memory
        prompt = self.prompt(head + question)
        limit = self.check(len(prompt), max_tokens)
        prefix = prompts.beginning(self.prompt, head)
        # A question may begin so that its first characters and the last of the head are one token.
        prefix = prefix[: min(prompts.shared(prefix, prompt), len(prompt) - 1)]
        answer = Answer(prompt_tokens=len(prompt), document_tokens=len(prefix))
        return answer, self._pieces(answer, prompt, limit, start, name, progress)

    def _pieces(
        self,
        answer: Answer,
        prompt: list[int],
        limit: int,
        start: float,
        name: str,
        progress: Progress,
    ) -> Iterator[str]:
        from mlx_lm import stream_generate

        prefix, rest = prompt[: answer.document_tokens], prompt[answer.document_tokens :]
        opener = self._opener if name else Opener(self.loaded, self.config, None)
        opened = opener.open(prefix, name, progress)
        answer.cached = opened.cached
        answer.document_usage = measure(opened.caches)
        first = 0.0
        steps = stream_generate(
            self.loaded.model,
            self.loaded.tokenizer,
            mx.array(rest),
            max_tokens=limit,
            prompt_cache=opened.caches,
            prefill_step_size=PREFILL_CHUNK,
        )
        try:
            for step in steps:
                now = time.perf_counter()
                if not first:
                    first, answer.first_token_s = now, now - start
                answer.tokens += step.finish_reason != "stop"
                answer.decode_s = now - first
                if step.text:
                    answer.text += step.text
                    yield step.text
                if step.finish_reason:
                    answer.complete = step.finish_reason == "stop"
                    break
        finally:
            steps.close()
            answer.usage = measure(opened.caches)


@contextmanager
def opened_reader(
    model: str | Path | None,
    config: CompressionConfig | None,
    budget: int,
    store: DocumentCache | None,
    **options: Any,
) -> Iterator[Reader]:
    """A model by folder, GGUF file or hub id (None: the bundled one), ready to read.

    Args:
        options: further arguments of `mlx_lm.load`.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    with Reader(load(model, **options), config, budget, store) as reader:
        yield reader
