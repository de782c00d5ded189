"""GGUF files by their path: converted once, found again, and never half."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

import leankv_mlx
from leankv_mlx.cli import app
from leankv_mlx.engine import Engine
from leankv_mlx.engine.events import Failed, Loaded, Noted
from leankv_mlx.engine.requests import Load
from leankv_mlx.errors import ModelError
from leankv_mlx.mlx_lm import load
from leankv_mlx.mlx_lm.loading import resolve_model
from leankv_mlx.models import conversion, kept
from tests.gguf.files import TINY, built, gguf_weights, write

FIRST = "read for the first time"
ROOT = Path(leankv_mlx.__file__).parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache" / "models"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "Tiny-Model.Q5_0.gguf"
    tiny = TINY["llama"]
    write(path, tiny, gguf_weights(tiny, built(tiny)), lambda name: "Q5_0")
    return path


@pytest.fixture
def file(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path))


def notes(path: Path) -> list[str]:
    lines: list[str] = []
    resolve_model(path, note=lines.append)
    return lines


def test_a_file_is_a_model_that_has_its_name(file: Path, home: Path) -> None:
    loaded = load(file)
    assert loaded.path.name == file.name
    assert loaded.path.is_relative_to(home)
    assert loaded.config["model_type"] == "llama"
    assert loaded.model(mx.array([[1, 2, 3]])).shape == (1, 3, 288)


def test_the_second_start_converts_nothing(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = resolve_model(file)
    assert capfd.readouterr().err.startswith(f"leankv: note: {file.name} is {FIRST}")
    monkeypatch.setattr(kept, "convert", None)
    assert resolve_model(str(file)) == first
    os.utime(file)
    assert resolve_model(file) == first
    assert capfd.readouterr().err == ""


def test_a_file_that_moved_is_found_and_another_one_is_not(file: Path, home: Path) -> None:
    assert len(notes(file)) == 1
    moved = file.rename(file.with_name("other.name"))
    assert notes(moved) == []
    assert resolve_model(moved).name == "other.name"
    raw = bytearray(moved.read_bytes())
    raw[-1] ^= 1
    moved.write_bytes(raw)
    assert FIRST in notes(moved)[0]


def test_another_converter_converts_anew(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(notes(file)) == 1
    monkeypatch.setattr(kept, "VERSION", conversion.VERSION + 1)
    assert FIRST in notes(file)[0]


def test_samples_are_all_over_a_large_file(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_BEGINNING", 1 << 14)
    notes(file)
    size = file.stat().st_size
    raw = file.read_bytes()
    for at in (1 << 15, size // 2, size - 1):
        changed = bytearray(raw)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert FIRST in notes(file)[0]


def test_what_is_quantized_again_is_said_at_every_start(tmp_path: Path, home: Path) -> None:
    tiny, path = TINY["llama"], tmp_path / "a.gguf"
    kinds = {"blk.0.ffn_up.weight": "Q6_K", "blk.0.attn_q.weight": "Q6_K", "output.weight": "Q2_K"}
    weights = gguf_weights(tiny, built(tiny))
    write(path, tiny, weights, lambda name: kinds.get(name, "Q8_0"))
    said = "a.gguf: tensors that were quantized again, to 8 bits: 1 of type Q2_K, 2 of type Q6_K."
    assert notes(path)[1:] == [said]
    assert notes(path) == [said]


def test_a_damaged_file_leaves_nothing(file: Path, home: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"Tiny-Model.Q5_0.gguf: it is cut off"):
        load(file)
    assert not [path for path in home.rglob("*") if path.suffix or "unfinished" in path.name]


def test_what_a_dead_writer_left_is_removed(file: Path, home: Path) -> None:
    converted = resolve_model(file).resolve()
    dead = converted.parent / ".unfinished-0123"
    converted.rename(dead)
    assert FIRST in notes(file)[0]
    assert not dead.exists()


def test_processes_at_once_make_one_folder(file: Path, home: Path) -> None:
    code = (
        "import sys; from leankv_mlx.mlx_lm.loading import load; "
        "print(load(sys.argv[1]).path, flush=True)"
    )
    command = [sys.executable, "-c", code, str(file)]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert not [path for path in home.rglob("*") if "unfinished" in path.name]


def test_a_cache_that_cannot_be_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path / "taken"))
    with pytest.raises(ModelError, match=r"set LEANKV_HOME .* leankv models import"):
        load(file)


def test_the_disk_is_full(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_weights", full)
    with pytest.raises(ModelError, match="No space left on device; make room"):
        load(file)
    assert not [path for path in home.rglob("*") if "unfinished" in path.name]


def test_the_engine_reports_a_conversion(file: Path, home: Path) -> None:
    seen: list[object] = []
    over = threading.Event()

    def emit(event: object) -> None:
        seen.append(event)
        if isinstance(event, Loaded | Failed):
            over.set()

    engine = Engine(emit)
    engine.start()
    engine.submit(Load(str(file), kv="leankv"))
    assert over.wait(60)
    engine.close()
    assert any(isinstance(event, Noted) and FIRST in event.text for event in seen)
    assert next(event for event in seen if isinstance(event, Loaded)).name == file.name


def test_generate_takes_a_file(file: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(file), "--prompt", "hello", "--max-tokens", "4"]
    assert app.run(["generate", *arguments]) == 0
    assert "KV" in capfd.readouterr().err


def test_import_writes_a_folder_that_mlx_lm_loads(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm import load as mlx_lm_load

    folder = tmp_path / "new" / "folder"
    assert app.run(["models", "import", str(file), str(folder), "--dtype", "float16"]) == 0
    assert "is ready" in capfd.readouterr().out
    model = mlx_lm_load(str(folder))[0]
    assert model(mx.array([[1, 2]])).dtype == mx.float16
    assert app.run(["models", "import", str(file), str(folder)]) == 2
    assert "is there already" in capfd.readouterr().err


@pytest.mark.parametrize("content", [None, b"no model", b"GGUF"])
def test_import_of_what_is_no_model(
    content: bytes | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    assert app.run(["models", "import", str(path), str(tmp_path / "folder")]) == 1
    err = capfd.readouterr().err
    assert err.startswith("leankv: error: ") and err.count("\n") == 1
    assert str(path) in err
    assert not (tmp_path / "folder").exists()


def test_the_list_of_models_is_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["models", "--json"]) == 0
    assert capfd.readouterr().out.startswith("[")


@pytest.mark.parametrize("damage", ["config", "deep", "cut", "none"])
def test_a_damaged_conversion_is_made_anew(damage: str, file: Path, home: Path) -> None:
    """A traceback at every start, from a file of the cache that somebody or the disk damaged."""
    converted = resolve_model(file).resolve()
    weights = converted / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(whole[:-10])
    elif damage == "none":
        weights.unlink()
    else:
        (converted / "config.json").write_text("{}" if damage == "config" else "[" * 100_000)
    assert FIRST in notes(file)[0]
    assert weights.read_bytes() == whole
    assert notes(file) == []


KILLED_IMPORT = """
import sys, time
from pathlib import Path
from leankv_mlx.models import conversion

def wait(*args):
    print("half-way", flush=True)
    time.sleep(60)

conversion.write_weights = wait
conversion.convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_the_next_import_removes_what_a_killed_one_left(file: Path, tmp_path: Path) -> None:
    """Gigabytes that nobody finds again; what a live import writes stays."""
    place = tmp_path / "models"
    precious = place / ".unfinished-thesis"
    precious.mkdir(parents=True)
    command = [sys.executable, "-c", KILLED_IMPORT, str(file), str(place / "a")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as importing:
        assert importing.stdout is not None
        assert importing.stdout.readline() == "half-way\n"
        conversion.convert(file, place / "b")
        assert len(list(place.iterdir())) == 3  # its writer lives
        importing.kill()
        importing.wait(30)
    conversion.convert(file, place / "c")
    assert sorted(path.name for path in place.iterdir()) == [precious.name, "b", "c"]
