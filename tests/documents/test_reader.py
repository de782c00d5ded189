"""Questions about documents: the same answers with and without the cache, far sooner with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.reader import Answer, Reader
from leankv_mlx.errors import ContextLengthError
from leankv_mlx.mlx_lm import LoadedModel, attach, load, make_caches, measure
from leankv_mlx.mlx_lm.footprint import Footprint, spare_memory
from leankv_mlx.mlx_lm.reading import prefill
from tests.documents.files import FACT, QUESTION, prose

DOCUMENT = f"{prose(12)}\n\n{FACT}\n\n{prose(12, 13)}"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture
def store(tmp_path: Path) -> DocumentCache:
    def failed(line: str) -> None:
        raise AssertionError(line)

    return DocumentCache(failed, tmp_path, 10**9)


@pytest.fixture
def reader(loaded: LoadedModel, store: DocumentCache) -> Iterator[Reader]:
    with Reader(loaded, CompressionConfig(), 0, store) as made:
        yield made


def said(reader: Reader, document: str, question: str, name: str = "doc") -> Answer:
    answer, pieces = reader.answer(document, question, 64, name)
    text = "".join(pieces)
    assert answer.text == text
    return answer


def test_the_second_question_opens_the_document(reader: Reader, store: DocumentCache) -> None:
    first = said(reader, DOCUMENT, QUESTION)
    again = said(reader, DOCUMENT, QUESTION)
    other = said(reader, DOCUMENT, "Summarize the document.")
    assert "48213" in first.text
    assert (first.cached, again.cached, other.cached) == (False, True, True)
    assert again.text == first.text
    assert first.document_tokens == again.document_tokens > first.prompt_tokens - 20
    assert first.document_usage.used == again.document_usage.used
    assert again.first_token_s < first.first_token_s
    assert first.complete
    assert first.tokens == len(reader.loaded.tokenizer.encode(first.text, add_special_tokens=False))
    (entry,) = store.entries()
    assert entry.nbytes == pytest.approx(first.document_usage.used, rel=0.05)
    assert entry.tokens == first.document_tokens


def test_the_answer_is_that_of_a_run_without_a_cache(loaded: LoadedModel, reader: Reader) -> None:
    for question in (QUESTION, "\n\nTell me more", "?"):
        with Reader(loaded, CompressionConfig(), 0, None) as bare:
            expected = said(bare, DOCUMENT, question)
        assert said(reader, DOCUMENT, question).text == expected.text
        assert said(reader, DOCUMENT, question).text == expected.text


def test_each_setting_and_document_has_its_own_entry(
    loaded: LoadedModel, store: DocumentCache
) -> None:
    for kv in ("leankv", "leankv:k3v3", "none"):
        config = None if kv == "none" else CompressionConfig.parse(kv)
        with Reader(loaded, config, 0, store) as made:
            for document in (DOCUMENT, DOCUMENT.replace("48213", "55555")):
                answers = [said(made, document, QUESTION) for _ in range(2)]
                assert [answer.cached for answer in answers] == [False, True]
                assert ("55555" if "55555" in document else "48213") in answers[1].text
    assert len(store.entries()) == 6


def test_nothing_is_kept_without_a_name(reader: Reader, store: DocumentCache) -> None:
    assert "48213" in said(reader, DOCUMENT, QUESTION, name="").text
    assert not store.entries()


def test_a_damaged_entry_gives_a_note_and_the_same_answer(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    notes: list[str] = []
    store = DocumentCache(notes.append, tmp_path, 10**9)
    with Reader(loaded, CompressionConfig(), 0, store) as made:
        first = said(made, DOCUMENT, QUESTION)
        (path,) = tmp_path.glob("*.safetensors")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        again = said(made, DOCUMENT, QUESTION)
        assert (again.text, again.cached) == (first.text, False)
        assert len(notes) == 1
        assert said(made, DOCUMENT, QUESTION).cached


def test_an_interrupted_reading_keeps_nothing(reader: Reader, store: DocumentCache) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    _, pieces = reader.answer(DOCUMENT, QUESTION, 64, "doc", stop)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert not store.entries()
    assert not said(reader, DOCUMENT, QUESTION).cached


def test_what_does_not_fit_is_said_before_reading(loaded: LoadedModel) -> None:
    with Reader(loaded, CompressionConfig(), 0, None) as reader:
        with pytest.raises(ContextLengthError, match="the model's context 8192; summarize it"):
            reader.answer("word " * 9000, QUESTION, 64)
        reader.budget = 200_000
        with pytest.raises(ContextLengthError, match=r"the budget is 0\.2 MB; raise"):
            reader.answer(DOCUMENT, QUESTION, 64)
        reader.budget = reader.footprint.used(500)
        room = reader.longest
        tokens = len(reader.prompt("x" * 300))
        assert reader.check(room - 5, 64) == 5
        assert reader.check(tokens, 64) == 64


@pytest.mark.parametrize("kv", ["leankv", "leankv:k3v2,window=32", "none"])
@pytest.mark.parametrize("tokens", [100, 700, 1500])
def test_the_footprint_is_what_a_prompt_takes(kv: str, tokens: int, loaded: LoadedModel) -> None:
    config = None if kv == "none" else CompressionConfig.parse(kv)
    with Reader(loaded, config) as reader:
        caches = make_caches(loaded.model)
        prefill(loaded.model, [1] * tokens, caches, lambda done, total: None)
        usage = measure(caches)
        assert reader.footprint.used(tokens) == usage.used
        assert reader.footprint.uncompressed(tokens) == usage.fp16  # the demo model is bf16


def test_the_longest_context_of_a_budget(loaded: LoadedModel) -> None:
    footprint = Footprint.of(loaded.model, attach(loaded.model))
    for budget in (10**6, 3 * 10**6):
        tokens = footprint.longest(budget, 8192)
        assert footprint.used(tokens) <= budget < footprint.used(tokens + 1)
    assert footprint.longest(10**12, 8192) == 8192
    assert footprint.longest(10, 8192) == 0
    assert spare_memory(loaded.model) > 0
