"""The demonstration: one model answers from an uncompressed and from a compressed cache.

The document is read once per cache; every question goes to a copy of that cache, alternating
between the two so that a change in the machine's load hits both. The bundled model gets what it was
trained on, facts of every kind and a summary in the words of the document; other models get what
even small ones can do, numbers, and no question whose answer could not be checked.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ModelError, UsageError
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.retrieval import tokens_of
from leankv_mlx.evaluation.tasks import (
    NUMBERS,
    DocumentChat,
    Sample,
    document_chat,
    document_turn,
    facts,
    fit,
    score,
    seeded,
    weave,
)
from leankv_mlx.mlx_lm.attachment import attach, make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context, load
from leankv_mlx.mlx_lm.usage import Usage, measure
from leankv_mlx.resources import demo_model

BUNDLED_TOKENS = 3000
OTHER_TOKENS = 1000
"""Lengths by default: a real model may read fewer than 100 tokens a second on a CPU."""
ANSWER_TOKENS = 96
CHUNK = 2048
"""Of the document, as mlx-lm reads it by default."""
_FACTS = 4


@dataclass(frozen=True)
class Answer:
    """`score` is 1 for a right answer; a summary's is its likeness to the expected one."""

    text: str
    score: float
    tokens: int

    @property
    def mark(self) -> str:
        """Right, wrong, or how near a summary is."""
        if self.score in (0.0, 1.0):
            return "✓" if self.score else "✗"
        return f"✗ ({self.score:.0%} alike)"


@dataclass(frozen=True)
class Question:
    """What was asked and what each arm answered."""

    text: str
    expected: str
    answers: list[Answer]


@dataclass
class Arm:
    """One cache: its bytes after the document was read, and how fast it was."""

    title: str
    kv: str
    backend: str
    usage: Usage = field(default_factory=Usage)
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_speed(self) -> float:
        """Tokens of the document per second."""
        return self.prefill_tokens / self.prefill_seconds

    @property
    def decode_speed(self) -> float:
        """Answer tokens per second, after the first of each answer."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Demo:
    """Everything that was shown; `arms` are the uncompressed and the compressed cache."""

    model: str
    document_tokens: int
    questions: list[Question]
    arms: list[Arm]

    @property
    def ratio(self) -> float:
        """How many times smaller the compressed cache is, bytes in use of both; than in 16 bits
        where the uncompressed cache has more."""
        plain, compressed = (arm.usage for arm in self.arms)
        return min(plain.used, plain.fp16) / compressed.used if compressed.used else 1.0

    def right(self, arm: int) -> int:
        """Questions that an arm answered exactly."""
        return sum(question.answers[arm].score == 1 for question in self.questions)

    def numbers(self) -> list[tuple[str, list[str]]]:
        """Rows of the table of numbers."""
        n = len(self.questions)
        return [
            ("right answers", [f"{self.right(i)} of {n}" for i in range(len(self.arms))]),
            ("KV bytes in use", [f"{arm.usage.used / 1e6:.3f} MB" for arm in self.arms]),
            ("allocated", [f"{arm.usage.allocated / 1e6:.3f} MB" for arm in self.arms]),
            ("prefill", [f"{arm.prefill_speed:.0f} tokens/s" for arm in self.arms]),
            ("decode", [f"{arm.decode_speed:.1f} tokens/s" for arm in self.arms]),
            ("backend", [arm.backend for arm in self.arms]),
        ]

    @property
    def conclusion(self) -> str:
        """The line at the end."""
        plain = self.arms[0].usage
        than = " than in 16 bits" if plain.used > plain.fp16 else ""
        return (
            f"{self.ratio:.2f}x smaller{than} at {plain.tokens} tokens. Bytes are those of the "
            "buffers' parts in use: codes, scales, tables, exact tokens and centers; keys and "
            "values when uncompressed."
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        arms = [
            {
                **asdict(arm),
                "right": self.right(i),
                "prefill_tokens_per_second": arm.prefill_speed,
                "decode_tokens_per_second": arm.decode_speed,
            }
            for i, arm in enumerate(self.arms)
        ]
        return {
            "model": self.model,
            "document_tokens": self.document_tokens,
            "ratio": self.ratio,
            "counted": self.conclusion,
            "arms": arms,
            "questions": [asdict(question) for question in self.questions],
        }


def run_demo(
    name: str | None, config: CompressionConfig, tokens: int | None = None, seed: int = 1
) -> Demo:
    """Ask the questions of a generated document of `tokens` tokens (None for the default).

    Raises:
        ModelError: the model cannot be loaded or has no chat template.
        UsageError: the length does not suit the document or the model.
    """
    loaded = load(name)
    if not loaded.tokenizer.has_chat_template:
        raise ModelError(f"{loaded.path} has no chat template; the demo needs a chat model.")
    bundled = loaded.path == demo_model()
    tokens = (BUNDLED_TOKENS if bundled else OTHER_TOKENS) if tokens is None else tokens
    check_context(loaded.config, tokens, ANSWER_TOKENS)
    make = demo_document if bundled else number_document
    chat = make(loaded, tokens, seed)
    prompts = [tokens_of(loaded, document_turn(chat.document, ask)) for ask, _ in chat.turns]
    prefix = _common(prompts)
    attachment = attach(loaded.model, config)
    arms = [
        _Runner(loaded, Arm("uncompressed", "none", "mlx"), nullcontext),
        _Runner(loaded, Arm(config.spec(), config.spec(), attachment.backend), lambda: attachment),
    ]
    for arm in arms:
        arm.warm_up(prompts[0])
    for arm in arms:
        arm.read(prompts[0][:prefix])
    questions = []
    for (ask, expected), prompt in zip(chat.turns, prompts, strict=True):
        replies = [arm.answer(prompt[prefix:]) for arm in arms]
        graded = [Answer(text, grade(chat, ask, expected, text), n) for text, n in replies]
        questions.append(Question(ask, expected, graded))
    called = Path(name).name if name else ""
    return Demo(called or loaded.path.name, prefix, questions, [arm.arm for arm in arms])


def demo_document(loaded: LoadedModel, tokens: int, seed: int) -> DocumentChat:
    """What the bundled model was trained on: a document, at most `tokens` long with its first
    question, facts of every kind in it, and a summary. A fact's sentence is its answer.

    Raises:
        UsageError: there is no room for the facts.
    """
    rng = seeded("test", "demo", seed)
    with _room_for_facts(tokens):
        return document_chat(rng, tokens, lambda turn: len(tokens_of(loaded, turn)), hidden=_FACTS)


def number_document(loaded: LoadedModel, tokens: int, seed: int) -> DocumentChat:
    """What small chat models manage: such a document with numbers in it, each asked for in the
    plain form. The number is the answer, whatever is said around it.

    Raises:
        UsageError: there is no room for the facts.
    """
    rng = seeded("test", "demo", seed)
    codes = [name for name in NUMBERS if name != "budget"]  # 48213 might be said as 48,213
    some = list(islice(facts(rng, "test", codes), _FACTS))
    needles = [(rng.uniform(0.1, 1.0), fact.sentence) for fact in some]

    def build(pieces: list[str]) -> Sample:
        return Sample(weave(pieces, needles), some[0].question, (some[0].value,))

    with _room_for_facts(tokens):
        filler = prose.sentences(rng)
        sample = fit(build, filler, tokens, lambda turn: len(tokens_of(loaded, turn)))
    turns = tuple((fact.question, fact.value) for fact in some)
    return DocumentChat(sample.document, turns, tuple(some))


@contextmanager
def _room_for_facts(tokens: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"--tokens {tokens} is too short for the facts; use 400 or more."
        ) from error


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prefix that all prompts share, at least one token of each left over."""
    length = min(map(len, prompts)) - 1
    for a, b in pairwise(prompts):
        same = next((i for i in range(length) if a[i] != b[i]), length)
        length = min(length, same)
    return length


def grade(chat: DocumentChat, ask: str, expected: str, reply: str) -> float:
    """Facts by the value that the reply contains, a summary by its likeness."""
    for fact in chat.asked:
        if expected in (fact.sentence, fact.value):
            return score(Sample(chat.document, ask, (fact.value,)), reply)
    want, got = expected.split(), reply.split()
    return 1.0 if want == got else min(0.99, SequenceMatcher(None, want, got).ratio())


class _Runner:
    """Runs one arm; `attached` gives the context in which the model has this arm's cache."""

    def __init__(
        self, loaded: LoadedModel, arm: Arm, attached: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.arm = arm
        self._loaded = loaded
        self._attached = attached
        self._caches: list[Any] = []

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Run once what will be timed, so that no kernel is compiled within a timing."""
        with self._attached():
            caches = make_caches(self._loaded.model)
            self._forward(tokens[:128], caches)
            self._forward(tokens[128:129], caches)

    def read(self, tokens: Sequence[int]) -> None:
        """Fill this arm's cache with the document."""
        with self._attached():
            self._caches = make_caches(self._loaded.model)
            start = time.perf_counter()
            # Not `reading.prefill`: what is measured is a cache that nobody tells of a prompt, so
            # that a budget in bytes holds while it is read.
            for i in range(0, len(tokens), CHUNK):
                self._forward(tokens[i : i + CHUNK], self._caches)
            self.arm.prefill_seconds = time.perf_counter() - start
        self.arm.prefill_tokens = len(tokens)
        self.arm.usage = measure(self._caches)

    def answer(self, question: Sequence[int]) -> tuple[str, int]:
        """The answer to one question about the document, greedily, and its tokens."""
        from mlx_lm.generate import generate_step

        tokenizer = self._loaded.tokenizer
        reply: list[int] = []
        times: list[float] = []
        with self._attached():
            steps = generate_step(
                mx.array(list(question)),
                self._loaded.model,
                max_tokens=ANSWER_TOKENS,
                prompt_cache=copy.deepcopy(self._caches),
            )
            for token, _ in steps:
                times.append(time.perf_counter())
                if token in tokenizer.eos_token_ids:
                    break
                reply.append(token)
        self.arm.decode_tokens += len(times) - 1
        self.arm.decode_seconds += times[-1] - times[0]
        return " ".join(tokenizer.decode(reply, skip_special_tokens=True).split()), len(reply)

    def _forward(self, tokens: Sequence[int], caches: list[Any]) -> None:
        self._loaded.model(mx.array(list(tokens))[None], cache=caches)
        mx.eval([cache.state for cache in caches])
