"""Files are whole whoever else writes them; what a killed writer left goes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from leankv_mlx import atomic
from leankv_mlx.atomic import read_text, write_text
from leankv_mlx.errors import ConfigError
from leankv_mlx.profiles import profiles, put_damaged_aside, save_profile, user_profiles

ROOT = Path(__file__).parents[1]

# Each writes what its first argument names, and stops before the file is complete.
WRITERS = {
    "prompt cache": """
from leankv_mlx.mlx_lm import save_prompt_cache
write = lambda path: save_prompt_cache(path, [])
""",
    "profile": """
from leankv_mlx.profiles import save_profile
write = lambda path: save_profile(path, "mine", "k4v4", "")
""",
    "partial summary": """
from leankv_mlx.documents.partials import Partials
def write(path):
    partials = Partials(["job"], path.parent)
    partials.path = path
    partials.keep([1], 9, "text")
""",
    "settings": """
from leankv_app.settings import Settings, save
write = lambda path: save(path, Settings())
""",
}
HALF_WAY = """
import os, sys, time
from pathlib import Path

def wait(handle):
    print("half-way", flush=True)
    time.sleep(60)

if sys.argv[2] == "slow":
    os.fsync = wait
write(Path(sys.argv[1]))
"""


def command(kind: str, path: Path, speed: str) -> list[str]:
    return [sys.executable, "-c", WRITERS[kind] + HALF_WAY, str(path), speed]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_next_writer_removes_what_a_killed_one_left(kind: str, tmp_path: Path) -> None:
    """Temporary files for ever, and never those of a writer that lives."""
    path = tmp_path / "file"
    bystanders = [
        tmp_path / name for name in (".file.tmp", ".file.1234.tmp", ".other.0123abcd.tmp")
    ]
    for bystander in bystanders:
        bystander.write_text("of somebody else")

    def unfinished() -> list[Path]:
        return [x for x in tmp_path.iterdir() if x not in (path, *bystanders)]

    with subprocess.Popen(
        command(kind, path, "slow"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as writing:
        assert writing.stdout is not None
        assert writing.stdout.readline() == "half-way\n"
        assert len(unfinished()) == 1
        if kind in ("prompt cache", "settings"):  # of the others one writes after the other
            subprocess.run(command(kind, path, "fast"), cwd=ROOT, check=True)
            assert path.exists() and len(unfinished()) == 1  # its writer lives
        writing.send_signal(signal.SIGKILL)
        writing.wait(30)
    subprocess.run(command(kind, path, "fast"), cwd=ROOT, check=True)
    assert path.exists() and not unfinished()
    assert all(bystander.exists() for bystander in bystanders)


MANY = {
    "profiles": """
from leankv_mlx.profiles import save_profile
def add(folder, name): save_profile(folder / "profiles.toml", name, "k4v4", "")
""",
    "partials": """
from leankv_mlx.documents.partials import Partials
def add(folder, name):
    partials.keep([int(name[1]), int(name[3:])], 9, name)
partials = Partials(["job"], Path(sys.argv[1]))
""",
}


@pytest.mark.parametrize("kind", MANY)
def test_processes_that_write_at_once_lose_nothing(kind: str, tmp_path: Path) -> None:
    """Read, change and write again by two: the second one writes the first one's away."""
    code = f"import sys\nfrom pathlib import Path\n{MANY[kind]}\nfor i in range(25):\n"
    code += "    add(Path(sys.argv[1]), f'p{sys.argv[2]}-{i}')\n"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)], cwd=ROOT)
        for number in range(3)
    ]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    if kind == "profiles":
        assert len(tomllib.loads((tmp_path / "profiles.toml").read_text())["profiles"]) == 75
    else:
        from leankv_mlx.documents.partials import Partials

        assert Partials(["job"], tmp_path).kept == 75
    assert len(list(tmp_path.iterdir())) == 1


def test_a_long_name_of_wide_characters(tmp_path: Path) -> None:
    """Names are cut by bytes, not by characters."""
    path = tmp_path / ("名" * 84)
    write_text(path, "text")
    assert read_text(path) == "text"
    assert list(tmp_path.iterdir()) == [path]


def test_without_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    dead = tmp_path / ".file.0123abcd.tmp"
    dead.touch()
    monkeypatch.setattr(atomic.fcntl, "flock", none)
    write_text(tmp_path / "file", "text")
    save_profile(tmp_path / "profiles.toml", "mine", "k4v4", "")
    assert read_text(tmp_path / "file") == "text"
    assert dead.exists()


def test_what_is_put_aside_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    found = []
    for text in ("one", "two", "three"):
        path.write_text(text)
        found.append(atomic.put_aside(path))
    assert [aside.read_text() for aside in found] == ["one", "two", "three"]
    assert not path.exists()


# The user's profiles


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANKV_HOME", str(tmp_path))
    return user_profiles()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


DAMAGED: dict[str, bytes | Callable[[Path], None]] = {
    "deep nesting": b"x = " + b"[" * 100_000,
    "400 digits": b"profiles = 1" + b"0" * 400,
    "5000 digits": b"x = 1" + b"0" * 5000,
    "wrong types": b"[profiles]\nx = [1]",
    "NUL": b"[profiles.x]\nkv = 'k4v4\0'",
    "not UTF-8": b"[profiles.x]\nkv = '\xff\xfe'",
    "a folder": Path.mkdir,
    "a pipe": a_pipe,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_profiles_are_one_line_and_can_be_put_aside(kind: str, own: Path) -> None:
    """A traceback, or a wait without end, from a file that anyone can edit."""
    damage = DAMAGED[kind]
    if isinstance(damage, bytes):
        own.write_bytes(damage)
    else:
        damage(own)
    for read in (profiles, lambda: save_profile(own, "mine", "k4v4", "")):
        with pytest.raises(ConfigError, match="is not a file of profiles") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(own)) + 200
    line = put_damaged_aside()
    (aside,) = own.parent.iterdir()
    assert str(aside) in line and "\n" not in line
    if isinstance(damage, bytes):
        assert aside.read_bytes() == damage
    assert "small" in profiles() and put_damaged_aside() == ""


def test_profiles_of_any_text_are_read_again(own: Path) -> None:
    """A file that the program itself damaged: escaped halves of an emoji, names with a blank."""
    own.write_text("[profiles.'a b']\nkv = 'k3v3'\n", encoding="utf-8")
    save_profile(own, "mine", "k4v4", 'fast 🚀 "quoted" \x7f\x01 caf\udce9')
    rows = tomllib.loads(own.read_text(encoding="utf-8"))["profiles"]
    assert rows["a b"]["kv"] == "k3v3"
    assert rows["mine"]["about"] == 'fast 🚀 "quoted" \x7f\x01 caf?'
    assert {"a b", "mine"} < set(profiles())


def test_a_file_that_cannot_be_read_just_now_stays(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, or a network that is gone, say nothing about the file."""
    save_profile(own, "mine", "k4v4", "")

    def fail(path: Path) -> str:
        raise OSError(24, "Too many open files")

    from leankv_mlx import profiles as module

    monkeypatch.setattr(module, "read_text", fail)
    assert "Too many open files" in put_damaged_aside()
    assert own.exists()
