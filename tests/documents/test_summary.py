"""Summaries: one pass where it fits, pieces where not, and an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents import summary as module
from leankv_mlx.documents.partials import Partials
from leankv_mlx.documents.planning import plan
from leankv_mlx.documents.reader import Answer, Reader
from leankv_mlx.documents.readers import Document, read_document
from leankv_mlx.documents.summary import Interrupted, Listener, summarize
from leankv_mlx.errors import ContextLengthError, ModelError
from leankv_mlx.evaluation.demo import demo_document
from leankv_mlx.mlx_lm import LoadedModel, load
from tests.documents.files import pdf
from tests.documents.test_readers import MAKERS, made


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture
def reader(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    with Reader(loaded, CompressionConfig()) as found:
        yield found


@pytest.fixture(scope="module")
def sixty_pages(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Document:
    """About 4,000 tokens of the kind of text that the demo model knows."""
    words = demo_document(loaded, 4000, seed=3).document.split()
    pages = [words[i * len(words) // 60 : (i + 1) * len(words) // 60] for i in range(60)]
    path = tmp_path_factory.mktemp("pages") / "pages.pdf"
    return read_document(pdf(path, [" ".join(page) for page in pages]))


def alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one.split(), other.split()).ratio()


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_document_is_summarized(kind: str, reader: Reader, tmp_path: Path) -> None:
    document = read_document(made(kind, tmp_path))
    found = summarize(reader, document)
    assert found.strategy == "single"
    assert found.answer.complete
    assert "She carried a small lamp and a letter from the mayor." in found.text


def test_sixty_pages_in_one_pass_or_in_pieces(
    reader: Reader, loaded: LoadedModel, sixty_pages: Document
) -> None:
    assert 3500 < len(reader.prompt(sixty_pages.text)) < 4500
    reader.budget = 4_000_000
    one = plan(reader, sixty_pages.text, "medium", "auto", 48)
    assert one.strategy == "single"
    assert one.kv_bytes <= reader.budget < one.uncompressed_bytes
    assert not one.uncompressed_fits
    found = summarize(reader, sixty_pages, max_tokens=48)
    assert (found.strategy, found.rounds) == ("single", [])
    assert found.answer.usage.used <= one.kv_bytes
    assert alike(found.text, sixty_pages.text[: len(found.text)]) > 0.5
    with Reader(loaded, None, reader.budget) as uncompressed:
        assert plan(uncompressed, sixty_pages.text, "medium", "auto", 48).strategy == "map-reduce"
        with pytest.raises(ContextLengthError, match=r"the budget is 4\.0 MB"):
            plan(uncompressed, sixty_pages.text, "medium", "single", 48)

    reader.budget = 1_500_000
    steps: list[tuple[int, int]] = []
    pieces = summarize(
        reader, sixty_pages, max_tokens=48, listener=Listener(part=lambda *x: steps.append(x))
    )
    assert pieces.strategy == "map-reduce"
    assert pieces.rounds == [plan(reader, sixty_pages.text, "medium", "auto", 48).pieces]
    assert steps == [(i, pieces.rounds[0]) for i in range(pieces.rounds[0] + 1)]
    assert pieces.text
    assert pieces.answer.usage.used <= reader.budget


def test_rounds_follow_until_the_rest_fits(reader: Reader, sixty_pages: Document) -> None:
    reader.budget = reader.footprint.used(300)
    part = Document("part", sixty_pages.text[:3500])
    found = summarize(reader, part, max_tokens=48)
    assert len(found.rounds) > 1
    assert found.rounds == sorted(found.rounds, reverse=True)
    assert found.text


def test_strategies_that_are_asked_for(reader: Reader, sixty_pages: Document) -> None:
    pieces = plan(reader, sixty_pages.text, "medium", "map-reduce", 128)
    assert (pieces.strategy, pieces.pieces) == ("map-reduce", 1)
    reader.budget = 1_500_000
    with pytest.raises(ContextLengthError):
        plan(reader, sixty_pages.text, "medium", "single", 128)
    reader.budget = 10_000
    with pytest.raises(ContextLengthError, match="raise --memory-budget"):
        plan(reader, sixty_pages.text, "medium", "auto", 128)


class Model:
    """Stands in for generation: says what it is told, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reply: str, stop_at: int = -1) -> None:
        self.asked: list[str] = []
        self.stop_at = stop_at
        self.reply = reply
        monkeypatch.setattr(module, "_said", self.said)

    def said(
        self, reader: Reader, text: str, question: str, limit: int, name: str, listener: Listener
    ) -> Answer:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(text)
        return Answer(text=f"{self.reply} {len(self.asked)}")


def test_an_interrupted_run_goes_on(
    reader: Reader, sixty_pages: Document, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader.budget = 1_500_000
    first = Model(monkeypatch, "first", stop_at=2)
    with pytest.raises(Interrupted) as stopped:
        summarize(reader, sixty_pages, max_tokens=128)
    assert stopped.value.kept == 2
    second = Model(monkeypatch, "second")
    found = summarize(reader, sixty_pages, max_tokens=128)
    assert found.resumed == 2
    assert len(second.asked) == found.rounds[0] - 2 + 1
    assert second.asked[-1].startswith("first 1\n\nfirst 2\n\nsecond 1")
    assert not set(first.asked) & set(second.asked)
    assert not list((tmp_path / "home" / "cache" / "summaries").iterdir())
    third = Model(monkeypatch, "third")  # what is complete is not kept
    assert summarize(reader, sixty_pages, max_tokens=128).resumed == 0
    assert len(third.asked) == found.rounds[0] + 1


def test_other_settings_do_not_go_on_with_it(
    reader: Reader, loaded: LoadedModel, sixty_pages: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.budget = 1_500_000
    Model(monkeypatch, "first", stop_at=2)
    with pytest.raises(Interrupted):
        summarize(reader, sixty_pages, max_tokens=128)
    Model(monkeypatch, "second")
    with Reader(loaded, CompressionConfig(k_bits=3), reader.budget) as other:
        assert summarize(other, sixty_pages, max_tokens=128).resumed == 0
    changed = Document("x", sixty_pages.text + " end")
    assert summarize(reader, changed, max_tokens=128).resumed == 0


def test_a_model_that_does_not_shorten_is_not_asked_for_ever(
    reader: Reader, sixty_pages: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.budget = 1_500_000
    Model(monkeypatch, "word " * 2000)
    with pytest.raises(ModelError, match="as long as the text"):
        summarize(reader, sixty_pages, max_tokens=128)


def test_partial_summaries_are_whole_or_made_again(tmp_path: Path) -> None:
    partials = Partials(["job"], tmp_path)
    assert partials.find([1, 2], 9) is None
    partials.keep([1, 2], 9, "tëxt")
    again = Partials(["job"], tmp_path)
    assert (again.find([1, 2], 9), again.find([1, 2], 8), again.reused) == ("tëxt", None, 1)
    assert Partials(["other"], tmp_path).find([1, 2], 9) is None
    whole = partials.path.read_bytes()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 4
        partials.path.write_bytes(changed)
        assert Partials(["job"], tmp_path).find([1, 2], 9) is None
        partials.path.write_bytes(whole[:place])
        assert Partials(["job"], tmp_path).find([1, 2], 9) is None
    again.done()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_does_not_stop_a_summary(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    partials = Partials(["job"], tmp_path / "file" / "x")
    partials.keep([1], 9, "text")
    assert partials.find([1], 9) == "text"
    partials.done()
