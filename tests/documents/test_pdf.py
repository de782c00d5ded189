"""Lines of a PDF are joined only where the text runs on, and split words only where it is plain."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from leankv_mlx.documents.pdf import is_pdf
from leankv_mlx.documents.readers import read_document
from leankv_mlx.errors import DocumentError
from tests.documents.files import PARAGRAPHS, pdf, pdf_of_lines

PROSE = (
    "The keeper of the lighthouse walked down to the harbour before sunrise and she carried a "
    "small lamp and a letter from the mayor of the town, who had written about the health of all."
)


def wrapped(text: str, below: str = "") -> list[str]:
    return textwrap.wrap(text, 78, subsequent_indent=below, break_on_hyphens=False)


ITEMS = [
    "1. The keeper of the lighthouse walked down to the harbour before sunrise today,",
    "2. She carried a small lamp and a letter from the mayor of the town to the quay,",
    "3. The boats were late that morning, and nobody on the quay had slept all night,",
]
CODE = [
    "def weighted(values: Sequence[float], weights: Sequence[float]) -> float:",
    "total = sum(value * weight for value, weight in zip(values, weights))",
    "assert all(weight >= 0 for weight in weights), weights_are_not_negative",
    "return total / sum(weights)",
]
C_CODE = [
    "static int compute_the_sum_of_all_values(const int *values, int count) {",
    "for (int index = 0; index < count; index++) the_sum += values[index];",
    "return the_sum_of_all_values_that_were_given_to_this_function_before;",
]
TABLE = [
    "Name of the article          Quantity in stock     Price of one    Total",
    "Lamp oil of the best kind                   12             4.00    48.00",
    "Rope                                         3             1.50     4.50",
]
NARROW_TABLE = [
    "Name of the article Quantity in stock Price of one Total of all pieces",
    "Lamp oil of the very best kind that is to be had 12 4.00 48.00 49 50 51",
    "Rope 3 1.50 4.50",
]
BULLETS = [f"\u2022 {item[3:]}" for item in ITEMS]


@pytest.mark.parametrize("font", ["Courier", "Helvetica"])
@pytest.mark.parametrize("lines", [ITEMS, CODE, C_CODE, TABLE, NARROW_TABLE, BULLETS])
def test_lines_that_mean_something_stay_lines(lines: list[str], font: str, tmp_path: Path) -> None:
    """Kind: entries of a list, code and rows of a table become one line because they are long."""
    found = read_document(pdf_of_lines(tmp_path / "a.pdf", [lines], font=font)).text
    assert found.split("\n") == [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("font", ["Courier", "Helvetica"])
def test_what_runs_on_is_joined(font: str, tmp_path: Path) -> None:
    entries = [f"1. {PROSE}", f"2. {PROSE}"]
    lines = [*wrapped(PROSE), *(x for entry in entries for x in wrapped(entry, "   "))]
    found = read_document(pdf_of_lines(tmp_path / "a.pdf", [lines], font=font)).text
    assert found.split("\n") == [PROSE, *entries]


def test_a_hyphen_at_the_end_of_a_line_is_kept_unless_the_word_is_plainly_one(
    tmp_path: Path,
) -> None:
    """Kind: `well-` and `being` become `wellbeing`."""
    page = [
        "It is about the well-",
        "being of all and infor-",
        "mation. The information",
        "is old; re-",
        "entry is by the co-",
        "operators; cooperators and co-operators.",
    ]
    found = read_document(pdf_of_lines(tmp_path / "a.pdf", [page])).text
    assert " ".join(found.split()) == (
        "It is about the well-being of all and information. The information is old; "
        "re-entry is by the co-operators; cooperators and co-operators."
    )


def test_texts_about_pdf_are_texts(tmp_path: Path) -> None:
    """Kind: the first bytes are taken for all of a format."""
    for text in (
        "%PDF- is what a PDF begins with.",
        "%PDF-1.4 is the header of a file with obj and endobj in it.",
        "About PDF\n\n%PDF-1.7\n1 0 obj\nis how one begins.",
    ):
        (tmp_path / "a.txt").write_text(text)
        assert read_document(tmp_path / "a.txt").text == text
    whole = pdf(tmp_path / "b.pdf", PARAGRAPHS).read_bytes()
    assert is_pdf(whole) and is_pdf(b"\xef\xbb\xbf" + whole) and is_pdf(b"sent by mail\n" + whole)
    (tmp_path / "b.pdf").write_bytes(whole[:60])
    with pytest.raises(DocumentError, match="is damaged or no PDF"):
        read_document(tmp_path / "b.pdf")
