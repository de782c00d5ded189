"""The prose generator and the names that it deals to splits."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice

import pytest

from leankv_mlx.evaluation import prose
from leankv_mlx.evaluation.prose import Split


def test_the_same_seed_gives_the_same_text() -> None:
    assert prose.text(random.Random(7), 5000) == prose.text(random.Random(7), 5000)
    assert prose.text(random.Random(7), 5000) != prose.text(random.Random(8), 5000)


@pytest.mark.parametrize("characters", [0, 1, 100, 10_000])
def test_text_has_the_length_asked_for_in_whole_paragraphs(characters: int) -> None:
    text = prose.text(random.Random(1), characters)
    assert characters - 2 <= len(text) <= characters + 2500
    assert all(part[-1] in ".”" for part in text.split("\n\n") if part)


def test_a_negative_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected characters >= 0, got -1"):
        prose.text(random.Random(1), -1)


def test_every_slot_is_filled_and_sentences_look_like_sentences() -> None:
    for sentence in islice(prose.sentences(random.Random(2)), 3000):
        assert "{" not in sentence and "}" not in sentence
        assert sentence[0].isupper() or sentence[0] == "“"
        assert sentence[-1] in ".”"
        assert "  " not in sentence
        assert " a a" not in sentence and " a e" not in sentence and " a o" not in sentence


def test_prose_is_not_monotonous() -> None:
    sentences = list(islice(prose.sentences(random.Random(3)), 2000))
    assert len(set(sentences)) > 0.9 * len(sentences)
    assert len({word for sentence in sentences for word in sentence.split()}) > 600


def test_prose_cannot_contain_an_answer() -> None:
    text = prose.text(random.Random(4), 200_000)
    words = set(text.replace(".", " ").replace(",", " ").split())
    assert not any(character.isdigit() for character in text)
    assert words.isdisjoint([*prose.PLACES, *prose.FIRST_NAMES, *prose.LAST_NAMES])


@pytest.mark.parametrize(
    "names",
    [
        prose.PLACES, prose.THINGS, prose.FIRST_NAMES, prose.LAST_NAMES, prose.EPITHETS,
        prose.CREATURES, prose.SHADES, prose.HUES,
    ],
)  # fmt: skip
def test_names_are_distinct_and_every_split_has_some(names: list[str]) -> None:
    assert len(set(names)) == len(names)
    train, calibration, test = (
        prose.dealt(names, "train"),
        prose.dealt(names, "calibration"),
        prose.dealt(names, "test"),
    )
    assert sorted(train + calibration + test) == sorted(names)
    assert min(len(train), len(calibration), len(test)) >= 3


def _a_number(rng: random.Random, split: Split) -> str:
    return prose.number(rng, split, 4)


@pytest.mark.parametrize("draw", [_a_number, prose.made_up_word])
def test_numbers_and_words_of_splits_are_disjoint(
    draw: Callable[[random.Random, Split], str],
) -> None:
    rng = random.Random(5)
    train = {draw(rng, "train") for _ in range(500)}
    calibration = {draw(rng, "calibration") for _ in range(500)}
    test = {draw(rng, "test") for _ in range(500)}
    assert not train & calibration and not train & test and not calibration & test


@pytest.mark.parametrize("digits", [3, 4, 5, 6])
def test_numbers_have_their_digits(digits: int) -> None:
    rng = random.Random(6)
    assert {len(prose.number(rng, "test", digits)) for _ in range(200)} == {digits}
