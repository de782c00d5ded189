"""Whatever the bytes of a document are, the answer is a text or one line, within the limits."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from leankv_mlx.documents import isolated
from tests.documents.fuzz.hostile import KINDS, SECRET, inputs
from tests.documents.fuzz.serving import Outcome, Serving

_ARCHIVES = ("docx", "xlsx", "epub")


def fuzz(kind: str, folder: Path, count: int, seed: int) -> list[Outcome]:
    if kind in _ARCHIVES:
        pytest.importorskip("markitdown")
    (folder / "secret.txt").write_text(SECRET)
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # what an entity of a document names must not be read
        with Serving() as serving:
            for index, raw in enumerate(inputs(kind, folder, count, seed)):
                found = serving.parse(raw, f"a.{'txt' if kind == 'text' else kind}")
                outcomes.append(found)
                where = f"{kind}, seed {seed}, input {index}: {found.kind}, {found.text[-2000:]}"
                assert found.kind in ("text", "document", "memory", "time", "crash"), where
                assert SECRET not in found.text, where
                assert found.seconds < 20 and found.nbytes < isolated.MAX_MEMORY, where
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_some_hostile_documents_are_answered_within_the_limits(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, 30, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_2000_hostile_documents_are_answered_within_the_limits(kind: str, tmp_path: Path) -> None:
    outcomes = fuzz(kind, tmp_path, 2000, seed=int(os.environ.get("LEANKV_FUZZ_SEED", "1")))
    slowest, largest = max(o.seconds for o in outcomes), max(o.nbytes for o in outcomes)
    counts = dict(Counter(outcome.kind for outcome in outcomes))
    print(f"\n{kind}: {counts}, slowest {slowest:.1f} s, largest {largest / 1e6:.0f} MB")
