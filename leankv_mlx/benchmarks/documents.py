"""The second question about a document against the first: what the document cache is worth."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.reader import Answer, Reader
from leankv_mlx.errors import CacheFileError
from leankv_mlx.evaluation.demo import demo_document
from leankv_mlx.mlx_lm.loading import LoadedModel, load

TOKENS = 4400
"""Near the longest that the demo model was trained for."""
ROUNDS = 5
_ANSWER_TOKENS = 64


def measure_documents(tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, float | bool]:
    """Ask the demo model the same question twice in each round, with an empty cache before.

    Returns:
        Seconds are medians from the prompt to the first token, without the start of the process
        and the loading of weights; the speedup is the median of the rounds' ratios.

    Raises:
        CacheFileError: the document could not be kept.
    """
    loaded = load()
    chat = demo_document(loaded, tokens, seed=1)
    question = chat.turns[0][0]
    config = CompressionConfig()
    with Reader(loaded, config) as reader:  # kernels are compiled outside of what is timed
        _ask(reader, chat.document[:2000], question)
    pairs = [_round(loaded, config, chat.document, question) for _ in range(rounds)]
    first, second, stored = pairs[-1]
    return {
        "document_tokens": first.document_tokens,
        "first_seconds": median(one.first_token_s for one, _, _ in pairs),
        "second_seconds": median(two.first_token_s for _, two, _ in pairs),
        "speedup": median(one.first_token_s / two.first_token_s for one, two, _ in pairs),
        "same_answers": len({answer.text for *both, _ in pairs for answer in both}) == 1,
        "resident_bytes": second.document_usage.used,
        "file_bytes": stored,
        "file_over_resident": stored / second.document_usage.used,
    }


def _round(
    loaded: LoadedModel, config: CompressionConfig, document: str, question: str
) -> tuple[Answer, Answer, int]:
    """First and second answer, and the bytes of the file between them."""

    def failed(line: str) -> None:
        raise CacheFileError(line)

    with tempfile.TemporaryDirectory() as folder:
        store = DocumentCache(failed, Path(folder), limit=10**10)
        with Reader(loaded, config, store=store) as reader:
            first, second = (_ask(reader, document, question) for _ in range(2))
        (entry,) = store.entries()
    return first, second, entry.nbytes


def _ask(reader: Reader, document: str, question: str) -> Answer:
    answer, pieces = reader.answer(document, question, _ANSWER_TOKENS, "document")
    for _ in pieces:
        pass
    return answer
