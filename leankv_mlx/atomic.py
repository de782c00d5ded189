"""Files that are there whole or not at all, whoever else writes them and whenever a process dies.

A file is written beside its place, under a name of its own, and renamed. Its writer holds a lock
on that name which ends with the process, so the next writer knows what a dead one has left, and
removes nothing else. Where the file system has no locks nothing is removed, and nobody waits for
anybody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from leankv_mlx.folders import file_name

_MAX_TEXT = 1 << 24
"""Characters of a small file."""
_RANDOM = "00000000.tmp"
"""What a name ends with while the file is written, with other digits."""
_ATTEMPTS = 3
_LASTING = (errno.EINVAL, errno.EFBIG, errno.EACCES, errno.EPERM)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of another one at the end of the block; if anything fails,
    the older one stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    target = path.resolve()  # the file behind a link, not the link
    start = file_name(f".{target.name}", f".{_RANDOM}").removesuffix(_RANDOM)
    remove_dead(_unfinished(target.parent, start))
    file, scratch = _claimed(target.parent, start)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(scratch, target)  # while it is locked
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file; if anything fails, an older one stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    """The content of a small file.

    Raises:
        OSError: it cannot be read, is larger than any that was written, or is no file (a pipe could
            make us wait for ever).
        UnicodeDecodeError: it is no UTF-8.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    with open(handle, encoding="utf-8") as file:
        text = file.read(_MAX_TEXT + 1)
    if len(text) > _MAX_TEXT:
        raise OSError(errno.EFBIG, "it is too large", str(path))
    return text


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among those that lock the same folder, to read a file in it and write it again.

    Raises:
        OSError: there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_lasting(error: Exception) -> bool:
    """Whether a file that could not be read or understood will be no better the next time."""
    return not isinstance(error, OSError) or error.errno in _LASTING


def free_name(path: Path) -> Path:
    """Where to put a file that is damaged: beside it, under a name that nothing has."""
    aside = stamped = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = stamped.with_name(f"{stamped.name}-{number}")
    return aside


def put_aside(path: Path) -> Path:
    """Rename a file that is damaged; its new name.

    Raises:
        OSError: it cannot be renamed.
    """
    return path.rename(free_name(path))


def hold(path: Path) -> int:
    """Lock a file or folder that this process has just made and writes, until the handle that is
    returned is closed: `remove_dead` leaves it alone.

    Raises:
        FileNotFoundError: somebody removed it before.
    """
    handle = os.open(path, os.O_RDONLY)
    _lock(handle, fcntl.LOCK_EX)
    if not os.path.lexists(path):
        os.close(handle)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return handle


def remove_dead(unfinished: Iterable[Path]) -> None:
    """Remove files and folders that nobody holds any more."""
    for path in unfinished:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()
            finally:
                os.close(handle)


def _unfinished(folder: Path, start: str) -> list[Path]:
    """What writers of a name call their files."""
    name = re.compile(re.escape(start) + r"[0-9a-f]{8}\.tmp")
    try:
        return [folder / entry for entry in os.listdir(folder) if name.fullmatch(entry)]
    except OSError:
        return []


def _claimed(folder: Path, start: str) -> tuple[BinaryIO, Path]:
    """A new file, locked."""
    for _ in range(_ATTEMPTS):  # a cleaner may see it between the two steps, and remove it
        scratch = folder / f"{start}{secrets.token_hex(4)}.tmp"
        file = scratch.open("xb")
        _lock(file.fileno(), fcntl.LOCK_EX)
        if scratch.exists():
            return file, scratch
        file.close()
    raise OSError(errno.EAGAIN, "other programs remove what is being written", str(folder))


def _lock(handle: int, kind: int) -> bool:
    """Whether it is locked now; not if others hold it, or if the file system has no locks."""
    try:
        fcntl.flock(handle, kind)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name last; not every file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
