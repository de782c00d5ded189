"""What a model is to do with a mask as well as without: answer about documents, go on with text.

A lesson is a beginning and the tokens behind it, with what the model without a mask says behind
each of them. Documents are generated, with facts in prose or in the user's own text; facts and
words are those of the training split, which no evaluation uses. Half of the lessons go on with
text, because a head can be needed for that and not for retrieval.

Questions see the document through the mask, as they do where it was read before them. A question
that is read together with its document sees all of it, so lessons are the harder case.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import mlx.core as mx

from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.tasks import document_chat, document_turn, facts, seeded
from leankv_mlx.learning.beginning import Beginning, read
from leankv_mlx.learning.gates import logits
from leankv_mlx.mlx_lm import prompts
from leankv_mlx.mlx_lm.loading import LoadedModel

LIKELY = 256
"""Most likely tokens whose probabilities are kept of what the model says: nearly all of it."""
QUESTIONS = 6
STOPS = 6
TEXT_TOKENS = 96
"""Of a lesson that goes on with text."""

_SPARED = 6
"""Every sixth lesson is for the exam."""
_LENGTHS = (0.35, 0.55, 0.75, 1.0)  # of documents, of the longest
_HIDDEN = (4, 8, 16)
_TOKENS_OF_A_FACT = 40  # with as much between two of them
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_SHORTEST, _LONGEST = 30, 220  # characters of a sentence of the user's text that is a filler

Advance = Callable[[str, int], None]
"""Progress: what is being done, and how many tokens of it are done now."""


@dataclass(frozen=True)
class Lesson:
    """One thing to do.

    Attributes:
        tokens: behind the beginning.
        first: the first of them behind which it matters what is said.
        likely: the tokens that are most likely behind those, uint32 [n, LIKELY]; all of a smaller
            vocabulary.
        shares: their probabilities, float32 [n, LIKELY].
    """

    beginning: Beginning
    tokens: tuple[int, ...]
    first: int
    likely: mx.array
    shares: mx.array


@dataclass(frozen=True)
class Lessons:
    """All lessons, of both kinds."""

    answers: tuple[Lesson, ...]
    texts: tuple[Lesson, ...]

    @property
    def exam(self) -> tuple[Lesson, ...]:
        """What is never drawn, to judge by; of answers, which are many, a third."""
        return self.answers[_SPARED - 1 :: 3 * _SPARED] + self.texts[_SPARED - 1 :: _SPARED]

    def draw(self, seed: int, step: int) -> tuple[Lesson, Lesson]:
        """One of each kind."""
        rng = random.Random(f"{seed}/{step}")
        return rng.choice(_drawn(self.answers)), rng.choice(_drawn(self.texts))


@dataclass(frozen=True)
class Material:
    """What lessons are made of.

    Attributes:
        documents: how many with questions; a third as many texts, at least one.
        tokens: of the longest.
        seed: of everything that is drawn.
        text: the user's own; None for generated prose.
    """

    documents: int
    tokens: int
    seed: int
    text: str | None = None

    @property
    def texts(self) -> int:
        """How many."""
        return max(1, self.documents // 3)

    @property
    def work(self) -> int:
        """Tokens to read, about."""
        mean = sum(_LENGTHS) / len(_LENGTHS)
        return round(self.tokens * (mean * self.documents + self.texts))


def _drawn(lessons: Sequence[Lesson]) -> list[Lesson]:
    return [lesson for i, lesson in enumerate(lessons, 1) if i % _SPARED]


def prepare(loaded: LoadedModel, material: Material, advance: Advance) -> Lessons:
    """Read all documents and texts. To be used while `asking`.

    Raises:
        UsageError: the user's text is too short or has no sentences, or documents are too short.
    """
    # In this order a text that is too short is found before anything is read.
    texts = [
        lesson for i in range(material.texts) for lesson in _going_on(loaded, material, i, advance)
    ]
    answers = [
        lesson
        for i in range(material.documents)
        for lesson in _about_document(loaded, material, i, advance)
    ]
    return Lessons(tuple(answers), tuple(texts))


def _about_document(
    loaded: LoadedModel, material: Material, i: int, advance: Advance
) -> Iterator[Lesson]:
    tokenizer = loaded.tokenizer

    def tokens(turn: str) -> list[int]:
        rendered = prompts.render(tokenizer, [{"role": "user", "content": turn}])
        return prompts.encode(tokenizer, rendered)

    rng = seeded("train", "masks", material.seed, i)
    length = round(material.tokens * _LENGTHS[i % len(_LENGTHS)])
    own = material.text is not None and i % 2
    filler = _sentences(material.text or "", rng, length) if own else prose.sentences(rng)
    hidden = min(_HIDDEN[i % len(_HIDDEN)], length // _TOKENS_OF_A_FACT)
    try:
        chat = document_chat(rng, length, lambda t: len(tokens(t)), "train", filler, hidden)
    except ValueError as error:
        raise UsageError(
            f"documents of {length} tokens are too short for {hidden} facts; give more --tokens."
        ) from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    asked = chat.asked[:QUESTIONS]
    turns = [tokens(document_turn(chat.document, fact.question)) for fact in asked]
    shared = min(prompts.shared(turns[0], turn) for turn in turns[1:])
    (beginning,) = read(loaded.model, turns[0], [shared])
    advance("reading documents", shared)
    for fact, turn in zip(asked, turns, strict=True):
        reply = [*prompts.encode(tokenizer, fact.sentence), *end]
        behind = [*turn[shared:], *reply]
        yield _lesson(loaded, beginning, behind[:-1], len(turn) - shared - 1)


def text_of(loaded: LoadedModel, material: Material, rng: random.Random) -> list[int]:
    """The tokens of a text to go on with.

    Raises:
        UsageError: the user's text is too short.
    """
    count, own = material.tokens, material.text
    text = _generated(rng, count) if own is None else _excerpt(own, rng, count)
    tokens = prompts.encode(loaded.tokenizer, text)[:count]
    if len(tokens) < count:
        raise UsageError(
            f"the text is too short for lessons of {count} tokens; give a longer one, or fewer "
            "--tokens."
        )
    return tokens


def _going_on(
    loaded: LoadedModel, material: Material, i: int, advance: Advance
) -> Iterator[Lesson]:
    rng = seeded("train", "texts", material.seed, i)
    tokens = text_of(loaded, material, rng)
    stops = sorted(rng.sample(range(len(tokens) // 6, len(tokens) - TEXT_TOKENS), STOPS))
    for beginning in read(loaded.model, tokens, stops):
        behind = tokens[beginning.tokens : beginning.tokens + TEXT_TOKENS]
        yield _lesson(loaded, beginning, behind, 0)
    advance("reading texts", len(tokens))


def _lesson(loaded: LoadedModel, beginning: Beginning, tokens: Sequence[int], first: int) -> Lesson:
    said = mx.softmax(logits(loaded.model, beginning, tokens, None)[first:], axis=-1)
    most = min(LIKELY, said.shape[-1])
    likely = mx.argpartition(-said, most - 1, axis=-1)[:, :most]
    shares = mx.take_along_axis(said, likely, axis=-1)
    mx.eval(likely, shares)
    return Lesson(beginning, tuple(tokens), first, likely, shares)


def _sentences(text: str, rng: random.Random, tokens: int) -> Iterator[str]:
    """Sentences of a part of a text in order, again and again."""
    parts = (" ".join(part.split()) for part in _SENTENCE.split(_excerpt(text, rng, tokens)))
    kept = [part for part in parts if _SHORTEST < len(part) < _LONGEST]
    if not kept:
        raise UsageError("the text has no sentences; give a text in sentences.")
    yield from cycle(kept)


def _excerpt(text: str, rng: random.Random, tokens: int) -> str:
    """A part of a text that has at least so many tokens, if there is enough."""
    length = 8 * tokens  # characters; few texts have so many for a token
    at = rng.randrange(max(1, len(text) - length))
    return text[at : at + length]


def _generated(rng: random.Random, tokens: int) -> str:
    """Prose with a fact in every third sentence, half of which were stated before."""
    filler, new = prose.sentences(rng), facts(rng, "train")
    stated: list[str] = []
    parts: list[str] = []
    for _ in range(tokens // 8):  # three sentences have more than eight tokens
        if stated and rng.random() < 0.5:
            fact = rng.choice(stated[-24:])
        else:
            fact = next(new).sentence
            stated.append(fact)
        parts.append(" ".join([*islice(filler, 2), fact]))
    return "\n\n".join(" ".join(parts[i : i + 3]) for i in range(0, len(parts), 3))
