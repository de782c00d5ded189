"""Names of files: their limit is bytes, not characters."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from leankv_app.store import export
from leankv_mlx.atomic import write_text
from leankv_mlx.cache import container
from leankv_mlx.documents.readers import read_document
from leankv_mlx.folders import file_name

LONG_NAMES = ("灯" * 80 + ".json", "灯" * 84, "𝄞" * 60 + ".safetensors", "é" * 127, "x" * 255)


def test_a_name_is_cut_between_characters_at_255_bytes() -> None:
    for stem in ("灯" * 100, "𝄞" * 100, "a灯" * 70, "x" * 300, "\udce9" * 300, "short", ""):
        for suffix in ("", ".tmp", "-2.md", "灯" * 90):
            name = file_name(stem, suffix)
            start = name.removesuffix(suffix)
            assert name.endswith(suffix) and stem.startswith(start)
            size = len(name.encode(errors="surrogateescape"))
            assert size <= 255 or not start
            assert start == stem or size > 255 - 4  # no more is cut than has to be


@pytest.mark.parametrize("name", LONG_NAMES)
def test_files_with_the_longest_names_are_written(name: str, tmp_path: Path) -> None:
    """Kind: a temporary name is cut by characters and too long in bytes."""
    path = tmp_path / name
    write_text(path, "text")
    write_text(path, "again")
    assert path.read_text() == "again"
    assert read_document(path).text == "again"
    container.write(path, {"x": mx.zeros(3)}, {})
    assert container.read_metadata(path) is not None
    assert [found.name for found in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", LONG_NAMES)
def test_a_free_name_beside_a_long_one(name: str, tmp_path: Path) -> None:
    written = [export.write(tmp_path / name, str(number)) for number in range(12)]
    assert [path.read_text() for path in written] == [str(number) for number in range(12)]
    assert len(set(written)) == 12
    assert {path.suffix for path in written} == {Path(name).suffix}


def test_a_title_of_any_script_is_a_name() -> None:
    for title in ("灯" * 80, "𝄞" * 80, "a/b" * 40, "é" * 200, ""):
        assert len(export.file_name(title).encode()) <= 255
