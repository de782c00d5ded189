"""Fidelity: how far the model with a compressed cache is from the model without.

A text is cut into chunks of a fixed context, each with the tokenizer's BOS (if it has one) in
front. The first half of a chunk is prefilled in chunks of 512 tokens. From the middle on, tokens
are teacher-forced in calls of `step` tokens (32), and every scored token attends to the compressed
past of its call: nothing is scored by a single prefill. The calls are aligned with the flushes of
the window, so that a query sees exactly the rows that token-by-token decoding would show it:
the same tokens exact and the same ones as codes. Only the kernel depends on the step: up to 8
tokens attend to the codes, more of them to a decoded copy of the compressed cache. Settings with a
policy or a mask of channels take the first half for the prompt, drop at its end what they drop, and
go on in calls of 8 tokens, as if those were generated.

The model computes in float32 throughout. The uncompressed arm goes through the same calls, once for
all arms: they read a chunk side by side, so that its distributions, in float32, are there for one
call at a time and not for the whole chunk (4.3 GB for 4,096 tokens and 262k words).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx import nn

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.arms import Arm, Size, in_float32, settle
from leankv_mlx.evaluation.metrics import (
    Fidelity,
    TokenScores,
    compare,
    log_probabilities,
    summarize,
)
from leankv_mlx.evaluation.tasks import facts, seeded
from leankv_mlx.kernels import MAX_DECODE_TOKENS
from leankv_mlx.mlx_lm.attachment import Attachment, make_caches, products_of
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.settings import BLOCK_SLOTS

STEP = BLOCK_SLOTS
_TOGETHER = 16  # arms whose caches are there at the same time: calibration compares hundreds

Advance = Callable[[str, int], None]
"""Progress: what is being done, and how many tokens of it are done now."""


@dataclass(frozen=True)
class Chunk:
    """tokens: [context], targets: [context], the token behind each."""

    tokens: mx.array
    targets: mx.array

    @property
    def context(self) -> int:
        """How many tokens there are."""
        return int(self.tokens.shape[0])

    @property
    def middle(self) -> int:
        """The first that is scored."""
        return self.context // 2


@dataclass(frozen=True)
class Corpus:
    """Chunks of one text, and the bytes of the text that is scored in each."""

    chunks: tuple[Chunk, ...]
    chunk_bytes: tuple[int, ...]

    @property
    def scored_bytes(self) -> int:
        """Of all chunks."""
        return sum(self.chunk_bytes)

    def part(self, begin: int, end: int | None = None) -> Corpus:
        """Some of the chunks."""
        return Corpus(self.chunks[begin:end], self.chunk_bytes[begin:end])

    @property
    def context(self) -> int:
        """Tokens of every chunk."""
        return self.chunks[0].context

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


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}.") from error


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
            f"the text has {len(ids)} tokens and a context of {context} needs {piece}; "
            "give a longer text or a smaller context."
        )
    pieces = [[*head, *ids[i * piece : (i + 1) * piece]] for i in range(count)]
    scored = [len(loaded.tokenizer.decode(p[context // 2 + 1 :]).encode()) for p in pieces]
    return Corpus(tuple(Chunk(mx.array(p[:-1]), mx.array(p[1:])) for p in pieces), tuple(scored))


def _encode(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False)
    return ids


def run_fidelity(
    loaded: LoadedModel,
    arms: Sequence[Arm],
    texts: Corpus,
    advance: Advance,
    step: int = STEP,
    sizes: dict[str, Size] | None = None,
) -> dict[str, Fidelity]:
    """Fidelity of every arm by its name; the first arm is the base of the comparison.

    Args:
        sizes: is told what each arm's caches hold at the end of the first chunk, or, where a policy
            drops tokens, once it has dropped what it drops of the first half.

    Raises:
        UsageError: the context is too short for an arm's window.
    """
    for arm in arms:
        _start(arm.config, texts.context)
    base, *others = arms
    groups = [others[i : i + _TOGETHER] for i in range(0, len(others), _TOGETHER)] or [[]]
    scores: dict[str, list[TokenScores]] = {arm.kv: [] for arm in arms}
    with in_float32(loaded.model):
        for chunk in texts.chunks:
            for i, group in enumerate(groups):
                report = advance if i == 0 else _ignore
                with ExitStack() as stack:
                    # The base first: its caches are made while nothing is attached.
                    reference = _Base(_Reading(loaded.model, base, chunk, step, report))
                    readings = []
                    for arm in group:
                        attachment = stack.enter_context(arm.attached(loaded.model))
                        readings.append(
                            _Reading(loaded.model, arm, chunk, step, advance, attachment)
                        )
                    found = _compared(reference, readings)
                if i:
                    del found[base.kv]
                for kv, parts in found.items():
                    scores[kv].append(parts)
                if sizes is not None:
                    for reading in (reference.reading, *readings):
                        sizes.setdefault(reading.arm.kv, reading.size)
    return {kv: summarize(chunks, texts.scored_bytes) for kv, chunks in scores.items()}


class _Reading:
    """One arm on its way through a chunk: the first half is in when it is made.

    The arm is attached then. Attention goes by the caches whatever is attached later; products go
    by what was attached last, so every call says whose they are.
    """

    def __init__(
        self,
        model: nn.Module,
        arm: Arm,
        chunk: Chunk,
        step: int,
        advance: Advance,
        attachment: Attachment | None = None,
    ) -> None:
        self.arm, self.chunk = arm, chunk
        self.at = _start(arm.config, chunk.context)
        self._model, self._advance = model, advance
        self._products = products_of(model, attachment)
        self._step = min(step, MAX_DECODE_TOKENS) if arm.settles or arm.sparse else step
        self._caches = make_caches(model)
        prompt = cast(list[int], chunk.tokens[: self.at].tolist())
        prefill(model, prompt, self._caches)
        settle(model, self._caches, prompt)
        self._dropped = Size.of(self._caches) if arm.drops else None
        advance(f"fidelity {arm.kv}", self.at)

    @property
    def ended(self) -> bool:
        return self.at == self.chunk.context

    @property
    def size(self) -> Size:
        """Behind the first half if a policy drops tokens, else as it is now."""
        return self._dropped or Size.of(self._caches)

    def call(self) -> tuple[int, mx.array]:
        """Read up to the end of the next call that has scored tokens: the position of the first of
        them, and their log-probabilities [n, V]."""
        while True:
            begin, self.at = self.at, min(self.at + self._step, self.chunk.context)
            # Not `reading.prefill`: the logits of every call are scored.
            with self._products:
                tokens = self.chunk.tokens[None, begin : self.at]
                logits = self._model(tokens, cache=self._caches)[0]
            mx.eval(logits, [cache.state for cache in self._caches])
            self._advance(f"fidelity {self.arm.kv}", self.at - begin)
            first = max(begin, self.chunk.middle)
            if first < self.at:
                return first, log_probabilities(logits[first - begin :])


class _Base:
    """The base's distributions, read as they are asked for and kept as long as they are needed:
    those of a whole chunk would be gigabytes where the vocabulary is large."""

    def __init__(self, reading: _Reading) -> None:
        self.reading = reading
        self.scores: list[TokenScores] = []
        self._rows: list[tuple[int, mx.array]] = []  # position of the first row, rows [n, V]

    def rows(self, first: int, end: int) -> mx.array:
        """Log-probabilities [end - first, V]; `first` never goes back."""
        while self.reading.at < end:
            self._read()
        self._rows = [(at, rows) for at, rows in self._rows if at + rows.shape[0] > first]
        parts = [rows[max(0, first - at) : end - at] for at, rows in self._rows if at < end]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def finish(self) -> TokenScores:
        """Read the rest: the scores of the base beside itself."""
        while not self.reading.ended:
            self._rows = []
            self._read()
        return TokenScores.joined(self.scores)

    def _read(self) -> None:
        first, rows = self.reading.call()
        self._rows.append((first, rows))
        targets = self.reading.chunk.targets[first : self.reading.at]
        self.scores.append(compare(rows, rows, targets))


def _compared(base: _Base, readings: Sequence[_Reading]) -> dict[str, TokenScores]:
    """Read all to the end, always the one that is furthest behind, so that the base's rows are
    needed for a few calls only."""
    scores: dict[str, list[TokenScores]] = {reading.arm.kv: [] for reading in readings}
    while left := [reading for reading in readings if not reading.ended]:
        reading = min(left, key=lambda one: one.at)
        first, rows = reading.call()
        same, targets = base.rows(first, reading.at), reading.chunk.targets[first : reading.at]
        scores[reading.arm.kv].append(compare(same, rows, targets))
    found = {base.reading.arm.kv: base.finish()}
    return found | {kv: TokenScores.joined(parts) for kv, parts in scores.items()}


def _ignore(what: str, tokens: int) -> None:
    """Work that is done again is no progress."""


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
