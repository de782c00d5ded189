"""Pieces hold the whole text, fit, and end where a reader would pause."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st

from leankv_mlx.documents.chunks import chunks

TEXTS = st.text(alphabet="ab .!\n灯。é", max_size=200)


def words(text: str) -> int:
    return len(text.split())


def solid(text: str) -> str:
    return "".join(text.split())


@hypothesis.given(TEXTS, st.integers(1, 30))
def test_nothing_is_lost_and_every_piece_fits(text: str, limit: int) -> None:
    pieces = chunks(text, limit, len)
    assert solid("".join(pieces)) == solid(text)
    assert all(0 < len(piece) <= limit for piece in pieces)


@hypothesis.given(TEXTS, st.integers(4, 30))
def test_a_count_that_does_not_add_up_is_kept_to_as_well(text: str, limit: int) -> None:
    def count(part: str) -> int:
        return len(part) + len(part) // 10

    pieces = chunks(text, limit, count)
    assert solid("".join(pieces)) == solid(text)
    assert all(count(piece) <= limit for piece in pieces)


def test_paragraphs_stay_whole_and_fill_a_piece() -> None:
    paragraphs = [f"{number} " + "word " * 8 + "end" for number in range(10)]
    pieces = chunks("\n\n".join(paragraphs), 32, words)
    assert [piece.count("end") for piece in pieces] == [3, 3, 3, 1]
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)


def test_a_long_paragraph_is_cut_at_sentences_and_a_long_sentence_at_words() -> None:
    text = "Short one. " + "A longer sentence of seven words here. " * 3 + "x " * 30
    pieces = chunks(text, 10, words)
    assert pieces[0] == "Short one. A longer sentence of seven words here."
    assert pieces[1] == "A longer sentence of seven words here."
    assert pieces[2] == "A longer sentence of seven words here. x x x"
    assert [words(piece) for piece in pieces] == [9, 7, 10, 10, 10, 7]


def test_words_are_cut_only_if_they_do_not_fit() -> None:
    assert "".join(chunks("x" * 25, 10, len)) == "x" * 25
    assert chunks("one two three", 5, len) == ["one", "two", "three"]
    assert chunks("", 5, len) == chunks(" \n\n ", 5, len) == []
