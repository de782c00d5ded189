"""What lessons are made of: facts of the training split, the user's text, what the model says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.prose import dealt
from leankv_mlx.evaluation.tasks import NUMBERS
from leankv_mlx.learning import lessons
from leankv_mlx.learning.beginning import read
from leankv_mlx.learning.lessons import LIKELY, TEXT_TOKENS, Lesson, Lessons, Material, prepare
from leankv_mlx.mlx_lm import LoadedModel, load
from leankv_mlx.mlx_lm.patches import asking

FACT = re.compile(r"The ([\w ]+) of the ([\w-]+) (\w+) is (\w+(?: \w+)?)\.")
GENERATED = Material(documents=2, tokens=512, seed=3)
OWN = " ".join(
    f"Sentence {i} of this text tells of {i % 7} ships and {i % 11} gulls at sea.\n\n\n"
    for i in range(2000)
)


@dataclass
class Made:
    """Lessons, and the texts of all that were read for them."""

    lessons: Lessons
    texts: list[str]
    advanced: list[tuple[str, int]]

    def text(self, lesson: Lesson, loaded: LoadedModel) -> str:
        """Of its beginning and what is behind it up to where it counts."""
        starts = {id(one): text for one, text in zip(self.beginnings(), self.starts, strict=True)}
        rest = loaded.tokenizer.decode(lesson.tokens[: lesson.first + 1])
        return starts[id(lesson.beginning)] + rest

    starts: list[str]

    def beginnings(self) -> list[object]:
        """Those that were read, in that order."""
        each = (x.beginning for x in (*self.lessons.texts, *self.lessons.answers))
        return list({id(one): one for one in each}.values())


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    found = load(projections="mlx")
    found.model.set_dtype(mx.float32)  # several times faster on a CPU
    return found


def made(loaded: LoadedModel, material: Material) -> Made:
    texts, starts, advanced = [], [], []

    def reading(model: object, tokens: list[int], stops: list[int]) -> Iterator[object]:
        texts.append(loaded.tokenizer.decode(tokens))
        starts.extend(loaded.tokenizer.decode(tokens[:stop]) for stop in stops)
        yield from read(loaded.model, tokens, stops)

    with pytest.MonkeyPatch.context() as patch, asking(loaded.model):
        patch.setattr(lessons, "read", reading)
        patch.setattr(lessons, "QUESTIONS", 3)
        patch.setattr(lessons, "STOPS", 3)
        found = prepare(loaded, material, lambda *step: advanced.append(step))
    return Made(found, texts, advanced, starts)


@pytest.fixture(scope="module")
def generated(loaded: LoadedModel) -> Made:
    return made(loaded, GENERATED)


def test_what_counts_first_is_the_reply(loaded: LoadedModel, generated: Made) -> None:
    """Behind the last token of a prompt that asks for a fact of its document, and of all texts."""
    assert len(generated.lessons.answers) == 3 + 3
    for lesson in generated.lessons.answers:
        prompt = generated.text(lesson, loaded)
        reply = loaded.tokenizer.decode(lesson.tokens[lesson.first + 1 :])
        fact = FACT.fullmatch(reply)
        assert fact and fact[0] in prompt  # in its document
        asked = f"What is the {fact[1]} of the {fact[2]} {fact[3]}?"
        assert asked in prompt and prompt.index(fact[0]) < prompt.index(asked)
        assert len(loaded.tokenizer.decode(lesson.tokens[: lesson.first + 1])) < 200
        assert lesson.likely.shape[0] == len(lesson.tokens) - lesson.first
    for lesson in generated.lessons.texts:
        assert lesson.first == 0 and len(lesson.tokens) == TEXT_TOKENS
        rest = loaded.tokenizer.decode(lesson.tokens)
        (whole,) = generated.texts[:1]
        assert generated.text(replace(lesson, first=-1), loaded) + rest in whole


def test_what_is_kept_of_what_the_model_says_is_nearly_all(
    loaded: LoadedModel, generated: Made
) -> None:
    for lesson in (*generated.lessons.answers, *generated.lessons.texts):
        rows = len(lesson.tokens) - lesson.first
        assert lesson.likely.shape == lesson.shares.shape == (rows, LIKELY)
        total = np.array(lesson.shares).sum(axis=-1)
        assert total.mean() > 0.98 and (total > 0.9).all() and (total < 1 + 1e-4).all()
        assert all(len(set(row)) == LIKELY for row in lesson.likely.tolist())
    lesson = generated.lessons.answers[0]
    best = mx.take_along_axis(lesson.likely, mx.argmax(lesson.shares, -1, keepdims=True), -1)
    said = loaded.tokenizer.decode([lesson.tokens[lesson.first], *best[:-1, 0].tolist()])
    assert FACT.search(said)  # the bundled model finds facts


def test_facts_are_those_of_training(generated: Made) -> None:
    """No place, name or number of them is one that an evaluation or a calibration asks for."""
    of = {"PLACES": prose.PLACES, "FIRST_NAMES": prose.FIRST_NAMES, "LAST_NAMES": prose.LAST_NAMES}
    others = {
        name: {*dealt(names, "calibration"), *dealt(names, "test")} for name, names in of.items()
    }
    stated = [fact for text in generated.texts for fact in FACT.finditer(text)]
    assert len(stated) > 15 and len({fact[0] for fact in stated}) > 10
    for fact in stated:
        assert fact[2] in dealt(prose.PLACES, "train")
        if fact[1] in NUMBERS:
            assert int(fact[4]) % 7 in range(5)
    for text in generated.texts:
        assert not {*re.findall(r"[\w-]+", text)} & set.union(*others.values())


def test_one_seed_gives_the_same_lessons_and_another_others(
    loaded: LoadedModel, generated: Made
) -> None:
    material = replace(GENERATED, documents=1)
    again, other = made(loaded, material), made(loaded, replace(material, seed=4))
    assert again.texts == generated.texts[:2] and not {*again.texts} & {*other.texts}
    for one, same in zip(again.lessons.answers, generated.lessons.answers, strict=False):
        assert one.tokens == same.tokens and one.first == same.first
        assert mx.array_equal(one.shares, same.shares)
        assert mx.array_equal(one.likely, same.likely)
    drawn = [generated.lessons.draw(5, step) for step in range(40)]
    assert drawn == [generated.lessons.draw(5, step) for step in range(40)]
    assert drawn != [generated.lessons.draw(6, step) for step in range(40)]
    for answer, text in drawn:
        assert any(answer is one for one in generated.lessons.answers)
        assert any(text is one for one in generated.lessons.texts)


def test_work_is_what_is_read(generated: Made) -> None:
    told = sum(tokens for _, tokens in generated.advanced)
    assert {what for what, _ in generated.advanced} == {"reading documents", "reading texts"}
    mean = GENERATED.work / (GENERATED.documents + GENERATED.texts)
    assert abs(told - GENERATED.work) < mean  # lengths take turns


def test_a_user_s_text_is_gone_on_with_and_hides_facts(loaded: LoadedModel) -> None:
    own = made(loaded, replace(GENERATED, text=OWN))
    text, prose_document, document = own.texts
    assert "ships" in text and not FACT.search(text)
    assert "ships" not in prose_document
    assert document.count("gulls") > 3 and FACT.search(document)
    assert "  " not in document.split("Document:")[1].replace("\n\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "too short for lessons of 512 tokens"),
        ("   \n", "too short for lessons of 512 tokens"),
        ("A few words of the user, and no more.", "too short for lessons of 512 tokens"),
        ("words and words " * 4000, "the text has no sentences"),
    ],
)
def test_a_text_that_gives_no_lessons_is_one_line(
    text: str, message: str, loaded: LoadedModel
) -> None:
    with asking(loaded.model), pytest.raises(UsageError, match=message) as caught:
        prepare(loaded, replace(GENERATED, text=text), lambda *_: None)
    assert "\n" not in str(caught.value)


def test_a_short_text_is_refused_before_anything_is_read(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "read", lambda *_: pytest.fail("it reads"))
    with pytest.raises(UsageError, match="too short"):
        prepare(loaded, replace(GENERATED, documents=9, text="Short."), lambda *_: None)


def test_documents_that_facts_fill_are_one_line(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "_lesson", lambda *_: None)
    monkeypatch.setattr(lessons, "_LENGTHS", (0.1,))
    monkeypatch.setattr(lessons, "_TOKENS_OF_A_FACT", 5)
    with asking(loaded.model), pytest.raises(UsageError, match=r"tokens are too short for . facts"):
        prepare(loaded, replace(GENERATED, documents=1), lambda *_: None)
