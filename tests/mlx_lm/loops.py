"""mlx-lm's server without HTTP: our generation loop with a tiny model, asked from threads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm import server
from mlx_lm.models.cache import make_prompt_cache

from leankv_mlx import attach
from leankv_mlx.mlx_lm.attachment import Attachment
from leankv_mlx.mlx_lm.serving.client import Client
from leankv_mlx.mlx_lm.serving.generator import generator_of
from leankv_mlx.mlx_lm.serving.served import Served
from leankv_mlx.serving import PromptStore

ARGS = {
    "model": "tiny", "decode_concurrency": 32, "prompt_concurrency": 8, "prefill_step_size": 128,
    "prompt_cache_size": 10, "prompt_cache_bytes": None, "kv_bits": None, "kv_group_size": 64,
    "quantized_kv_start": 0, "chat_template_args": {}, "max_tokens": 8, "allowed_origins": "*",
}  # fmt: skip
SAMPLING = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
}  # fmt: skip
LOGITS = {
    "logit_bias": None, "repetition_penalty": 0.0, "repetition_context_size": 20,
    "presence_penalty": 0.0, "presence_context_size": 20, "frequency_penalty": 0.0,
    "frequency_context_size": 20,
}  # fmt: skip


class Numbers:
    """A tokenizer whose texts are the token ids themselves."""

    has_chat_template = has_tool_calling = has_thinking = False
    tool_parser = None
    eos_token_ids: Sequence[int] = ()
    structural_markers: Sequence[str] = ()
    response_transitions: dict[str, Any] = {}  # noqa: RUF012  (as mlx-lm has it)

    def encode(self, text: str, **options: Any) -> list[int]:
        return [int(word) for word in text.split()]

    @property
    def detokenizer(self) -> Any:
        return Detokenizer()


class Detokenizer:
    last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = f"{token} "

    def finalize(self) -> None:
        pass


class Provider:
    """What mlx-lm's `ModelProvider` is to a loop."""

    processor = draft_model = None
    is_batchable = True
    model_key = ("tiny", None, None)

    def __init__(self, model: nn.Module, **args: Any) -> None:
        self.model, self.tokenizer = model, Numbers()
        self.cli_args = argparse.Namespace(**{**ARGS, **args})

    def load(self, *names: Any) -> tuple[Any, Any]:
        if names[0] == "missing":
            raise ValueError("there is no such model")
        return self.model, self.tokenizer

    def reset(self) -> None:
        pass


@dataclass
class Asked:
    """A request, and what comes of it."""

    prompt: list[int]
    tokens: int = 8
    client: Client = field(default_factory=Client)
    reply: list[int] = field(default_factory=list)
    reason: str | None = None
    error: Exception | None = None
    refused: Exception | None = None
    context: Any = None
    thread: Thread | None = None

    def wait(self) -> Asked:
        assert self.thread is not None
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self


class Server:
    """A loop, with what it is asked."""

    def __init__(self, generator: Any, model: nn.Module) -> None:
        self.generator, self.model = generator, model

    def ask(self, prompt: Sequence[int], tokens: int = 8, **options: Any) -> Asked:
        """Begin with a request; `options` are those of `SAMPLING` and `LOGITS`."""
        asked = Asked(list(prompt), tokens)
        asked.thread = Thread(target=self._answer, args=(asked, options))
        asked.thread.start()
        return asked

    def _answer(self, asked: Asked, options: dict[str, Any]) -> None:
        request = server.CompletionRequest("text", " ".join(map(str, asked.prompt)), [], None, None)
        try:
            asked.context, pieces = self.generator.generate(
                request, arguments(asked.tokens, **options), None, asked.client
            )
        except Exception as error:
            asked.refused = error
            return
        try:
            for piece in pieces:
                asked.reply.append(piece.token)
                asked.reason = piece.finish_reason
        except Exception as error:
            asked.error = error
        finally:
            asked.client.left = True

    @property
    def report(self) -> dict[str, Any]:
        return self.generator.report()

    def alone(self, prompt: Sequence[int], tokens: int = 8) -> list[int]:
        """The reply that a prompt gets with nothing beside it."""
        from mlx_lm.generate import generate_step

        with mx.stream(mx.default_device()):
            steps = generate_step(
                mx.array(list(prompt)), self.model, max_tokens=tokens,
                prompt_cache=make_prompt_cache(self.model), prefill_step_size=128,
            )  # fmt: skip
            return [token for token, _ in steps]


def arguments(tokens: int, **options: Any) -> server.GenerationArguments:
    """mlx-lm's arguments of a request."""
    sampling = {key: options.pop(key, value) for key, value in SAMPLING.items()}
    logits = {key: options.pop(key, value) for key, value in LOGITS.items()}
    return server.GenerationArguments(
        model=server.ModelDescription(options.pop("model", "default_model"), "default_model", None),
        sampling=server.SamplingArguments(**sampling),
        logits=server.LogitsProcessorArguments(**logits),
        stop_words=options.pop("stop_words", []),
        max_tokens=tokens,
        num_draft_tokens=3,
        logprobs=False,
        top_logprobs=-1,
        seed=options.pop("seed", None),
        chat_template_kwargs=None,
        **options,
    )


def stream_numbers(
    *, model: nn.Module, prompt: list[int], prompt_cache: list[Any], max_tokens: int, **options: Any
) -> Iterator[Any]:
    """mlx-lm's `stream_generate` for `Numbers`, which it would wrap."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, prompt_cache=prompt_cache, max_tokens=max_tokens)
    for n, (token, logprobs) in enumerate(steps, start=1):
        reason = "length" if n == max_tokens else None
        yield SimpleNamespace(text="", token=token, logprobs=logprobs, finish_reason=reason)


@contextmanager
def serving(
    model: nn.Module, kv: str = "leankv", limit: int | None = None, **args: Any
) -> Iterator[Server]:
    """A running loop for a model.

    Args:
        limit: bytes of all caches.
        args: flags of mlx-lm's server.
    """
    with attach(model, kv) as attachment:
        generator = generator_of(
            server.ResponseGenerator,
            lambda name, provider: _served(name, provider, attachment, limit),
            lambda caches: f"{len(caches)} caches",
        )(Provider(model, **args), PromptStore(args.get("prompt_cache_size", 10)))
        try:
            generator.wait()
            yield Server(generator, model)
        finally:
            generator.stop_and_join()


def _served(name: Any, provider: Provider, attachment: Attachment, limit: int | None) -> Served:
    config = {"max_position_embeddings": 4096}
    return Served.of(name, provider, config, (attachment,), limit)
