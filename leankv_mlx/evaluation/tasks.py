"""Retrieval tasks in the manner of RULER (arXiv 2404.06654), generated from seeds.

Every task hides facts in a document and asks for them; the prompt is the user's turn
`Document:\\n{document}\\n\\n{question}`. Facts read "The {attribute} of the {place} {thing} is
{value}.", the form that the demo model was trained on.

Splits never share an answer or a key: names, numbers and made-up words are dealt to them (see
`prose.dealt`). Places are dealt, so no (attribute, place, thing) is common to two splits;
attributes and things are shared, because they are the vocabulary of the questions. `seeded` names
the split in the seed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

from leankv_mlx.documents.readers import document_head
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.prose import Split, dealt, made_up_word, number

CountTokens = Callable[[str], int]
"""User's turn -> tokens of the whole prompt, that is with the chat template around it."""

NUMBERS = {
    "access code": 5, "phone extension": 4, "locker number": 4, "room number": 4, "budget": 6,
    "reference number": 6, "safe combination": 6, "flight number": 4, "invoice number": 5,
    "serial number": 6,
}  # fmt: skip
"""Attributes whose values are numbers, and how many digits."""
_PERSONS = ["manager", "founder", "architect", "supplier"]
_PHRASES = ["mascot", "emblem", "nickname", "codename"]
_WORDS = ["password"]
_COLOURS = ["favourite colour"]
ATTRIBUTES: tuple[str, ...] = (*NUMBERS, *_PERSONS, *_PHRASES, *_WORDS, *_COLOURS)

SUMMARY_QUESTION = "Summarize the document."
SUMMARY_SENTENCES = 2
_PARAGRAPH = 6  # sentences in a paragraph of a generated document


def seeded(split: Split, *parts: str | int) -> random.Random:
    """A generator whose seed names the split, so that no two splits share a seed."""
    return random.Random("/".join([split, *map(str, parts)]))


def _value(rng: random.Random, split: Split, attribute: str) -> str:
    if attribute in NUMBERS:
        return number(rng, split, NUMBERS[attribute])
    if attribute in _WORDS:
        return made_up_word(rng, split)
    if attribute in _COLOURS:
        first, second = prose.SHADES, prose.HUES
    elif attribute in _PERSONS:
        first, second = prose.FIRST_NAMES, prose.LAST_NAMES
    else:
        first, second = prose.EPITHETS, prose.CREATURES
    return f"{rng.choice(dealt(first, split))} {rng.choice(dealt(second, split))}"


@dataclass(frozen=True)
class Fact:
    """One needle: a key of three words and its value."""

    attribute: str
    place: str
    thing: str
    value: str

    @property
    def subject(self) -> str:
        return f"{self.attribute} of the {self.place} {self.thing}"

    @property
    def sentence(self) -> str:
        return f"The {self.subject} is {self.value}."

    @property
    def question(self) -> str:
        return f"What is the {self.subject}?"


def facts(
    rng: random.Random,
    split: Split,
    attributes: Sequence[str] = ATTRIBUTES,
    places: int | None = None,
    things: int | None = None,
) -> Iterator[Fact]:
    """Facts with distinct keys, until the keys run out.

    `places` and `things` limit how many of each are used: the fewer, the more words the facts
    share with each other.
    """
    some_places = dealt(prose.PLACES, split)
    rng.shuffle(some_places)
    some_things = rng.sample(prose.THINGS, things or len(prose.THINGS))
    used: set[tuple[str, str, str]] = set()
    some_places = some_places[:places]
    while len(used) < len(attributes) * len(some_places) * len(some_things):
        key = (rng.choice(attributes), rng.choice(some_places), rng.choice(some_things))
        if key not in used:
            used.add(key)
            yield Fact(*key, value=_value(rng, split, key[0]))


@dataclass(frozen=True)
class Sample:
    """A prompt with its expected answers; `reply` is a model answer, the target in training."""

    document: str
    question: str
    answers: tuple[str, ...]
    reply: str = field(default="", compare=False)


def user_turn(sample: Sample) -> str:
    """The user's message."""
    return document_turn(sample.document, sample.question)


def document_turn(document: str, question: str) -> str:
    """The user's message that asks the first question about a document."""
    return document_head(document) + question


def score(sample: Sample, reply: str) -> float:
    """Share of the answers that `reply` contains, 0..1; case is ignored, words must be whole.

    A number inside a longer number does not count: 4821 is not in "48213", "94821" or "4821.5".
    """
    text = " ".join(reply.split()).casefold()
    found = [
        re.search(rf"(?<!\w)(?<!\d\.){re.escape(answer.casefold())}(?!\w)(?!\.\d)", text)
        for answer in sample.answers
    ]
    return sum(map(bool, found)) / len(sample.answers)


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def weave(filler: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The filler sentences with every needle at its depth (0 first .. 1 last), in paragraphs."""
    places = sorted((round(depth * len(filler)), i) for i, (depth, _) in enumerate(needles))
    sentences = list(filler)
    for offset, (index, i) in enumerate(places):
        sentences.insert(index + offset, needles[i][1])
    starts = range(0, len(sentences), _PARAGRAPH)
    return "\n\n".join(" ".join(sentences[i : i + _PARAGRAPH]) for i in starts)


def fit(
    build: Callable[[list[str]], Sample], filler: Iterator[str], limit: int, count: CountTokens
) -> Sample:
    """`build` with as much filler as fits: the whole prompt has at most `limit` tokens.

    Pieces are counted one by one, which is an estimate (tokens can merge across a join); then
    whole prompts are counted near it, and the last gap takes the piece that fills it best.
    """

    def size(pieces: list[str]) -> int:
        return count(user_turn(build(pieces)))

    empty, room = count(""), limit - size([])
    if room < 0:
        raise ValueError(f"[fit] expected length_tokens >= {limit - room}, got {limit}.")
    sizes: dict[str, int] = {}  # noise and made-up words repeat
    pieces: list[str] = []
    while room > 0 and (piece := next(filler, None)) is not None:
        if piece not in sizes:
            sizes[piece] = max(1, count(" " + piece) - empty)
        pieces.append(piece)
        room -= sizes[piece]
    while pieces and size(pieces) > limit:
        pieces.pop()
    gap = limit - size(pieces)
    for piece in islice(filler, 256):  # bounded: some counters never let a piece fit
        longer = [*pieces, piece]
        used = count(" " + piece) - empty
        if used <= gap and (now := size(longer)) <= limit:
            pieces, gap = longer, limit - now
        if gap < 4:  # less than the shortest sentences
            break
    return build(pieces)


@dataclass(frozen=True)
class _Order:
    """What is asked of a task; the fields are the arguments of `Task.make`."""

    rng: random.Random
    length: int
    count: CountTokens
    depth: float | None
    split: Split

    def depths(self, n: int) -> list[float]:
        """Of n needles: all random, or the first at `depth` and the others evenly around."""
        if self.depth is None:
            return [self.rng.random() for _ in range(n)]
        return [self.depth, *((self.depth + i / n) % 1.0 for i in range(1, n))]

    def fit(self, build: Callable[[list[str]], Sample], filler: Iterator[str]) -> Sample:
        return fit(build, filler, self.length, self.count)


_Draw = Callable[[_Order], Sample]


def _noise(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(prose.NOISE)


def _needles(filler: Callable[[random.Random], Iterator[str]], hidden: int, asked: int) -> _Draw:
    """`hidden` facts in filler; the first `asked` of them are asked for."""

    def draw(order: _Order) -> Sample:
        some = list(islice(facts(order.rng, order.split), hidden))
        needles = list(zip(order.depths(hidden), (f.sentence for f in some), strict=True))
        asks = some[:asked]

        def build(pieces: list[str]) -> Sample:
            return Sample(
                weave(pieces, needles),
                " ".join(f.question for f in asks),
                tuple(f.value for f in asks),
                " ".join(f.sentence for f in asks),
            )

        return order.fit(build, filler(order.rng))

    return draw


def _dense(order: _Order) -> Sample:
    """A document of nothing but facts; one of them is asked for."""
    some = facts(order.rng, order.split)
    asked = next(some)
    needles = list(zip(order.depths(1), [asked.sentence], strict=True))

    def build(pieces: list[str]) -> Sample:
        return Sample(weave(pieces, needles), asked.question, (asked.value,), asked.sentence)

    return order.fit(build, (f.sentence for f in some))


def _values(order: _Order) -> Sample:
    """Four values of one key."""
    key = next(facts(order.rng, order.split, attributes=tuple(NUMBERS)))
    values = _distinct(lambda: number(order.rng, order.split, NUMBERS[key.attribute]), 4)
    stated = [replace(key, value=value).sentence for value in values]
    needles = list(zip(sorted(order.depths(4)), stated, strict=True))

    def build(pieces: list[str]) -> Sample:
        reply = f"The {key.subject} is {listed(values)}."
        return Sample(weave(pieces, needles), f"List every {key.subject}.", tuple(values), reply)

    return order.fit(build, prose.sentences(order.rng))


def _chain(order: _Order) -> Sample:
    """Two chains of variables, each a number and three copies; the names of one are asked for."""
    names = _distinct(lambda: made_up_word(order.rng, order.split), 8)
    values = [number(order.rng, order.split, digits) for digits in (5, 6)]
    needles: list[tuple[float, str]] = []
    for value, chain in zip(values, (names[:4], names[4:]), strict=True):
        links = [f"The variable {chain[0]} is {value}."]
        links += [f"The variable {b} is {a}." for a, b in pairwise(chain)]
        needles += zip(sorted(order.depths(4)), links, strict=True)

    def build(pieces: list[str]) -> Sample:
        question = f"Which variables are {values[0]}?"
        reply = f"The variables are {listed(names[:4])}."
        return Sample(weave(pieces, needles), question, tuple(names[:4]), reply)

    return order.fit(build, prose.sentences(order.rng))


def _frequent_words(order: _Order) -> Sample:
    """A list of words; the three most frequent are asked for. A depth has no meaning here."""

    def build(pieces: list[str]) -> Sample:
        top = [word for word, _ in Counter(pieces).most_common(3)] or ["none"]
        question = "What are the three most frequent words of the document?"
        reply = f"The three most frequent words are {listed(top)}."
        return Sample(" ".join(pieces), question, tuple(top), reply)

    return order.fit(build, _word_rounds(order.rng, order.split))


def _word_rounds(rng: random.Random, split: Split) -> Iterator[str]:
    """Made-up words: each shuffled round has three of them 6, 5 and 4 times and new ones once."""
    frequent = _distinct(lambda: made_up_word(rng, split), 3)
    while True:
        words = [word for word, n in zip(frequent, (6, 5, 4), strict=True) for _ in range(n)]
        words += [made_up_word(rng, split) for _ in range(9)]
        rng.shuffle(words)
        yield from words


def _distinct(draw: Callable[[], str], n: int) -> list[str]:
    """n different draws, in order."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)


@dataclass(frozen=True)
class Task:
    """One retrieval task."""

    name: str
    description: str
    draw: _Draw

    def make(
        self,
        rng: random.Random,
        length_tokens: int,
        count_tokens: CountTokens,
        depth: float | None = None,
        split: Split = "test",
    ) -> Sample:
        """A sample whose prompt is the longest that has at most `length_tokens` tokens.

        `depth` (0..1) places the needle that is asked for; where several are, it places the first
        and the others go evenly around the document (cyclically). None draws random depths.
        """
        if depth is not None and not 0.0 <= depth <= 1.0:
            raise ValueError(f"[{self.name}] expected depth in 0..1, got {depth}.")
        return self.draw(_Order(rng, length_tokens, count_tokens, depth, split))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("S1", "one fact in repeated noise sentences", _needles(_noise, 1, 1)),
        Task("S2", "one fact in prose", _needles(prose.sentences, 1, 1)),
        Task("MK1", "four facts in prose, one asked for", _needles(prose.sentences, 4, 1)),
        Task("MK2", "nothing but facts, one asked for", _dense),
        Task("MV", "four values of one key in prose, all asked for", _values),
        Task("MQ", "four facts in prose, all asked for", _needles(prose.sentences, 4, 4)),
        Task("VT", "two chains of four variables in prose, one asked for", _chain),
        Task("FWE", "a list of words, the three most frequent asked for", _frequent_words),
    )
}


@dataclass(frozen=True)
class DocumentChat:
    """A document and turns of (question, expected reply) about it."""

    document: str
    turns: tuple[tuple[str, str], ...]
    asked: tuple[Fact, ...]


def document_chat(
    rng: random.Random,
    length_tokens: int,
    count_tokens: CountTokens,
    split: Split = "test",
    filler: Iterator[str] | None = None,
    hidden: int = 4,
) -> DocumentChat:
    """Prose with a few facts, a question for each of them in random order, and a summary.

    The summary is the leading sentences of the document: `SUMMARY_SENTENCES` pieces of `filler`,
    sentences of generated prose by default. The document with its first question has at most
    `length_tokens` tokens.
    """
    some = list(islice(facts(rng, split), hidden))
    needles = [(rng.uniform(0.1, 1.0), fact.sentence) for fact in some]
    turns = [(ask(rng, fact), fact.sentence) for fact in rng.sample(some, hidden)]
    lead: list[str] = []

    def build(pieces: list[str]) -> Sample:
        lead[:] = pieces[:SUMMARY_SENTENCES]
        # The lead stands in front of every fact, so that the summary is prose.
        body = weave(pieces[SUMMARY_SENTENCES:], needles)
        return Sample(" ".join([*lead, body]), SUMMARY_QUESTION, ())

    document = fit(build, filler or prose.sentences(rng), length_tokens, count_tokens).document
    turns.insert(rng.randint(0, hidden), (SUMMARY_QUESTION, " ".join(lead)))
    return DocumentChat(document, tuple(turns), tuple(some))


def ask(rng: random.Random, fact: Fact) -> str:
    """One of the ways to ask for a fact."""
    forms = ("What is the {}?", "What is the {}?", "Tell me the {}.", "Find the {}.")
    return rng.choice(forms).format(fact.subject)
