"""GGUF files that were read before, kept as folders that mlx-lm loads.

An entry is named by the digest of the file's size, its beginning and samples of the rest, so it is
found again when the file is moved, and never when the file is another. In it lies the converted
folder and, for each name that the file had, a link to it: a model is called by its folder's name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from leankv_mlx.errors import ModelError
from leankv_mlx.folders import folder
from leankv_mlx.models.container import FlawError, open_file
from leankv_mlx.models.conversion import (
    CONFIG,
    VERSION,
    convert,
    inexact_line,
    is_whole,
    remove_unfinished,
)
from leankv_mlx.models.weights import Look, go_on

Note = Callable[[str], None]
"""Receives one line that the user should see."""

_CONVERTED = "converted"
_LOCK = ".lock"
_BEGINNING = 16 * 2**20  # metadata, vocabulary and first tensors
_SAMPLES, _SAMPLE_BYTES = 1024, 1024


def kept(path: Path, note: Note, look: Look = go_on) -> Path:
    """The folder of a GGUF file, made now if this is the first time.

    Args:
        note: told that a conversion begins, and what is not exactly as in the file.
        look: called for every piece of a conversion; may raise to stop.

    Returns:
        A folder that has the file's name.

    Raises:
        ModelError: the file cannot be read or its folder not be written.
    """
    place = folder("cache") / "models"
    entry = place / _identity(path)
    converted = entry / _CONVERTED
    if not is_whole(converted):
        note(f"{path.name} is read for the first time; what it becomes is kept for the next.")
        with _writing(place):
            _fill(path, converted, look)
    if line := inexact_line(path, converted):
        note(line)
    return _named(entry, path.name)


def _fill(path: Path, converted: Path, look: Look) -> None:
    """Convert, unless another process was faster; without locks it can be so until the end."""
    if is_whole(converted):
        return
    shutil.rmtree(converted, ignore_errors=True)  # what is left of one that was damaged
    try:
        convert(path, converted, look=look)
    except ModelError:
        if not is_whole(converted):
            raise


def _identity(path: Path) -> str:
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(f"{VERSION} {size}\n".encode(), digest_size=16)
            digest.update(file.read(_BEGINNING))
            rest = size - _BEGINNING - _SAMPLE_BYTES
            for sample in range(_SAMPLES if rest > 0 else 0):
                file.seek(_BEGINNING + rest * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except FlawError as error:
        raise ModelError(f"cannot read {path}: {error}.") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()


def _named(entry: Path, name: str) -> Path:
    """The converted folder by the file's name; where there are no links, by its own."""
    link = entry / name
    with suppress(OSError):  # it is there already, or the file system has none
        link.symlink_to(_CONVERTED)
    return link if (link / CONFIG).is_file() else entry / _CONVERTED


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """One conversion at a time. The lock ends with a process, so whoever has it knows that
    unfinished folders belong to dead writers."""
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (place / _LOCK).open("a")
    except OSError as error:
        raise ModelError(
            f"cannot write {place}: {error.strerror}; set LEANKV_HOME to another folder, "
            "or use leankv models import."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: then nothing is cleaned
            yield
            return
        for entry in place.iterdir():
            with suppress(OSError):  # a file of somebody else
                remove_unfinished(entry)
        yield
