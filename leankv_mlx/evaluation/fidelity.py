"""Fidelity: how far the model with a compressed cache is from the model without.

A text is cut into chunks of a fixed context, each with the tokenizer's BOS (if it has one) in
front. The first half of a chunk is prefilled in chunks of 512 tokens. From the middle on, tokens
are teacher-forced in calls of `step` tokens (32), and every scored token attends to the compressed
past of its call: nothing is scored by a single prefill. The calls are aligned with the flushes of
the window, so that a query sees exactly the rows that token-by-token decoding would show it:
the same tokens exact and the same ones as codes. Only the kernel depends on the step: up to 8
tokens attend to the codes, more of them to a decoded copy of the compressed cache. Settings with a
policy take the first half for the prompt, drop tokens at its end, and go on in calls of 8 tokens,
as if those were generated.

The model computes in float32 throughout, and the distributions of the uncompressed arm, which goes
through the same calls, are kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.config import BLOCK_SLOTS, CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.arms import Arm, in_float32, prefill, settle
from leankv_mlx.evaluation.metrics import (
    Fidelity,
    TokenScores,
    compare,
    log_probabilities,
    summarize,
)
from leankv_mlx.evaluation.tasks import facts, seeded
from leankv_mlx.kernels import MAX_DECODE_TOKENS
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.usage import Usage, measure

STEP = BLOCK_SLOTS

Advance = Callable[[str, int], None]
"""Progress: what is being done, and how many tokens of it are done now."""


@dataclass(frozen=True)
class Chunk:
    """tokens: [context], targets: [context], the token behind each."""

    tokens: mx.array
    targets: mx.array


@dataclass(frozen=True)
class Corpus:
    """Chunks of one text, and the bytes of the text that is scored in them."""

    chunks: tuple[Chunk, ...]
    scored_bytes: int

    @property
    def context(self) -> int:
        """Tokens of every chunk."""
        return int(self.chunks[0].tokens.shape[0])

    @property
    def work(self) -> int:
        """Tokens that one arm reads."""
        return self.context * len(self.chunks)


def generated_text(characters: int) -> str:
    """Prose with a fact in every third sentence; half of the facts were stated before.

    So there is much to predict that only the compressed part of the cache knows.
    """
    rng = seeded("test", "fidelity")
    filler, new = prose.sentences(rng), facts(rng, "test")
    stated: list[str] = []
    parts: list[str] = []
    size = 0
    while size < characters:
        if stated and rng.random() < 0.5:
            fact = rng.choice(stated[-24:])
        else:
            fact = next(new).sentence
            stated.append(fact)
        part = " ".join([next(filler), next(filler), fact])
        parts.append(part)
        size += len(part) + 1
    return "\n\n".join(" ".join(parts[i : i + 3]) for i in range(0, len(parts), 3))


def corpus(loaded: LoadedModel, text: str | None, context: int, chunks: int) -> Corpus:
    """The first `chunks` chunks of a text; None for generated text.

    Raises:
        UsageError: the text is shorter than one chunk.
    """
    bos = loaded.tokenizer.bos_token_id
    head = [] if bos is None else [bos]
    piece = context + 1 - len(head)
    if text is None:
        text = ""
        ids: list[int] = []
        while len(ids) < piece * chunks:
            text = generated_text(2 * len(text) or 4 * piece * chunks)
            ids = _encode(loaded, text)
    else:
        ids = _encode(loaded, text)
    count = min(chunks, len(ids) // piece)
    if not count:
        raise UsageError(
            f"the text has {len(ids)} tokens and --context {context} needs {piece}; "
            "give a longer text or a smaller --context."
        )
    pieces = [[*head, *ids[i * piece : (i + 1) * piece]] for i in range(count)]
    scored = sum(len(loaded.tokenizer.decode(p[context // 2 + 1 :]).encode()) for p in pieces)
    return Corpus(tuple(Chunk(mx.array(p[:-1]), mx.array(p[1:])) for p in pieces), scored)


def _encode(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False)
    return ids


def run_fidelity(
    loaded: LoadedModel,
    arms: Sequence[Arm],
    texts: Corpus,
    advance: Advance,
    step: int = STEP,
    usage: dict[str, Usage] | None = None,
) -> dict[str, Fidelity]:
    """Fidelity of every arm by its name; the first arm is the base of the comparison.

    Args:
        usage: is told what each arm's caches hold once the first half of the first chunk is read
            and its policy has dropped what it drops. Exact tokens are float32 here, or have the 16
            bits of the weights, see `mlx_lm.precision`.

    Raises:
        UsageError: the context is too short for an arm's window.
    """
    starts = [_start(arm.config, texts.context) for arm in arms]
    scores: dict[str, list[TokenScores]] = {arm.kv: [] for arm in arms}
    middle = texts.context // 2
    with in_float32(loaded.model):
        for chunk in texts.chunks:
            base: mx.array | None = None
            for arm, start in zip(arms, starts, strict=True):
                calls = min(step, MAX_DECODE_TOKENS) if arm.drops else step
                with arm.attached(loaded.model):
                    caches = make_caches(loaded.model)
                    prefill(loaded.model, chunk.tokens[:start], caches)
                    settle(loaded.model, caches, chunk.tokens[:start])
                    if usage is not None:
                        usage.setdefault(arm.kv, measure(caches))
                    reading = _read(loaded.model, caches, chunk, start, calls, base, scores[arm.kv])
                    parts = list(reading)
                if base is None:
                    base = mx.concatenate(parts)
                    mx.eval(base)
                    scores[arm.kv].append(compare(base, base, chunk.targets[middle:]))
                advance(f"fidelity {arm.kv}", texts.context)
    return {
        kv: summarize(TokenScores.joined(parts), texts.scored_bytes) for kv, parts in scores.items()
    }


def _start(config: CompressionConfig | None, context: int) -> int:
    """Where the calls of `step` tokens begin: at or before the middle, with a window just flushed.

    There the window has its smallest size, so that flushes come at the ends of calls.
    """
    config = config or CompressionConfig()
    exact = config.sink_tokens + config.window
    blocks = (context // 2 - exact) // BLOCK_SLOTS
    if blocks < 1:
        raise UsageError(
            f"a context of {context} leaves nothing to compress before its middle; "
            f"use --context {2 * (exact + BLOCK_SLOTS)} or more."
        )
    return exact + blocks * BLOCK_SLOTS


def _read(
    model: nn.Module,
    caches: list[Any],
    chunk: Chunk,
    start: int,
    step: int,
    base: mx.array | None,
    scores: list[TokenScores],
) -> Iterator[mx.array]:
    """Read a chunk from `start` on. Log-probabilities [n, V] of the tokens from the middle on are
    compared with those of the base as they come, or yielded if there is no base yet."""
    context = chunk.tokens.shape[0]
    middle = context // 2
    for begin in range(start, context, step):
        end = min(begin + step, context)
        logits = model(chunk.tokens[None, begin:end], cache=caches)[0]
        mx.eval(logits, [cache.state for cache in caches])
        first = max(begin, middle)
        if first >= end:
            continue
        part = log_probabilities(logits[first - begin :])
        if base is None:
            yield part
        else:
            same = base[first - middle : end - middle]
            scores.append(compare(same, part, chunk.targets[first:end]))
