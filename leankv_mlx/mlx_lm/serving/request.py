"""A request from its tokens to the last token of its reply, and what is checked before it begins.

Everything that can be wrong with it is found out here, before the client is told that an answer
comes, and before it shares a step with others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from leankv_mlx.errors import LeanKVError, RequestError
from leankv_mlx.mlx_lm.loading import check_context
from leankv_mlx.mlx_lm.serving.client import Client
from leankv_mlx.mlx_lm.serving.served import Served
from leankv_mlx.serving.sharing import Reading
from leankv_mlx.terminal import line


@dataclass(frozen=True, eq=False)
class Arrival:
    """A request as it came.

    Attributes:
        number: the same on all machines.
        request, args: mlx-lm's `CompletionRequest` and `GenerationArguments`.
    """

    number: int
    client: Client
    request: Any
    args: Any


@dataclass(eq=False)
class Request:
    """One that can run.

    Attributes:
        segments: the prompt, cut where it is worth storing what was read.
        types: what the store calls what ends with each segment.
        max_tokens: of the reply; the model's context has room for them.
        most: bytes of its caches at their longest.
        context: mlx-lm's `GenerationContext`.
        guarded: its functions that a step calls.
        uid: in the batch, -1 while it waits.
        reused: tokens of the prompt that were not read for it.
        tokens: in its caches.
        kept: of these, those that the store had when it took or gave a copy last.
        reading: its prompt, while that is read.
        by_itself: it is read with no other beside it, because a step with it and others failed.
        missed: the loop's count of changes when it did not fit after all.
    """

    number: int
    client: Client
    prompt: list[int]
    segments: list[list[int]]
    types: list[str]
    max_tokens: int
    most: int
    context: Any
    sampler: Callable[[mx.array], mx.array]
    processors: list[Guarded]
    stops: Any
    detokenizer: Any
    top_logprobs: int
    guarded: list[Guarded]
    uid: int = -1
    reused: int = 0
    tokens: int = 0
    kept: int = 0
    reading: Reading | None = None
    by_itself: bool = False
    missed: int = -1

    @property
    def error(self) -> Exception | None:
        """What one of its functions raised in a step."""
        return next((guarded.error for guarded in self.guarded if guarded.error), None)


class Guarded:
    """A function of one request in a step of many: what it raises is kept for its request, and the
    step goes on as if the request had no such function.

    Args:
        instead: what is called once it has failed.
    """

    def __init__(self, function: Callable[..., mx.array], instead: Callable[..., mx.array]) -> None:
        self._function, self._instead = function, instead
        self.error: Exception | None = None

    def __call__(self, *arrays: mx.array) -> mx.array:
        if self.error is None:
            try:
                return self._function(*arrays)
            except Exception as error:
                self.error = error
        return self._instead(*arrays)


def prepare(arrival: Arrival, generator: Any, served: Served) -> Request:
    """Make a request of what came.

    Args:
        generator: mlx-lm's `ResponseGenerator`, which knows how messages become tokens.

    Raises:
        RequestError: it has no meaning for this model.
        ContextLengthError: its prompt is longer than the model's context.
    """
    try:
        return _prepare(arrival, generator, served)
    except LeanKVError:
        raise
    except Exception as error:  # of templates, tokenizers and samplers, of any type
        text = line(f"{type(error).__name__}: {error}")
        raise RequestError(f"the request cannot be used: {text}") from error


def _prepare(arrival: Arrival, generator: Any, served: Served) -> Request:
    args, tokenizer, server = arrival.args, served.tokenizer, generator.server
    prompt, segments, types, state, _ = generator._tokenize(tokenizer, arrival.request, args)
    _check_tokens(prompt, served.vocabulary, "prompt")
    _check_tokens(args.logits.logit_bias or (), served.vocabulary, "logit_bias")
    max_tokens = check_context(served.config, len(prompt), args.max_tokens)
    stops, text_sm = generator._make_state_machine(served.key, tokenizer, args.stop_words)
    context = server.GenerationContext(
        has_tool_calling=tokenizer.has_tool_calling,
        has_thinking=tokenizer.has_thinking,
        tool_parser=tokenizer.tool_parser,
        text_sm=text_sm,
        initial_state=state,
        prompt=prompt,
    )
    sampler = server._make_sampler(args, tokenizer)
    processors = server._make_logits_processors(args)
    _try(sampler, processors, prompt, served.vocabulary)
    processors = [Guarded(function, _same) for function in processors]
    guarded, greedy = list(processors), _greedy()
    if sampler is not greedy:  # which mlx-lm calls once for all who have it
        sampler = Guarded(sampler, greedy)
        guarded.append(sampler)
    return Request(
        number=arrival.number,
        client=arrival.client,
        prompt=prompt,
        segments=segments,
        types=types,
        max_tokens=max_tokens,
        most=served.most(len(prompt) + max_tokens),
        context=context,
        sampler=sampler,
        processors=processors,
        stops=stops,
        detokenizer=tokenizer.detokenizer,
        top_logprobs=args.top_logprobs,
        guarded=guarded,
    )


def _check_tokens(tokens: Sequence[int] | dict[int, float], vocabulary: int, name: str) -> None:
    """An id that the model does not have would read or write beyond its arrays."""
    if name == "prompt" and not tokens:
        raise RequestError("the prompt is empty.")
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise RequestError(
            f"{name} has the token {wrong}, and the model has those from 0 to {vocabulary - 1}."
        )


def _try(
    sampler: Callable[..., Any],
    processors: Sequence[Callable[..., Any]],
    prompt: Sequence[int],
    vocabulary: int,
) -> None:
    """Call what a step will call; nothing of it is computed."""
    logits = mx.zeros((1, vocabulary))
    for processor in processors:
        logits = processor(mx.array(list(prompt[-1:])), logits)
    sampler(logits)


def _same(context: mx.array, logits: mx.array) -> mx.array:
    return logits


def _greedy() -> Any:
    from mlx_lm.sample_utils import greedy_sampler

    return greedy_sampler
