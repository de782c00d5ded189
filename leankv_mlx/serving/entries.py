"""A folder of compressed caches, found by the tokens that they hold.

Documents that were read before and prefixes that a server's prompts began with are entries of one
folder. An entry is a prompt cache file named by the digest of everything its content depends on, so
one of another model, setting, text or version is never looked at, and one that is damaged, or is
not what its name says, is removed and made anew. Its length is in its name too: with one listing
of the folder it is known which beginnings of a prompt to look for. Any number of processes may use
the folder: files appear whole or not at all, and one that vanishes is only tokens to read again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import mlx.core as mx

from leankv_mlx.cache import CompressedKVCache, container
from leankv_mlx.cache.persistence import PromptCache
from leankv_mlx.config import BackendName
from leankv_mlx.errors import BackendUnavailableError, CacheFileError, UnsupportedError, UsageError
from leankv_mlx.serving.held import held, tokens_of
from leankv_mlx.serving.keys import Key, Reading, is_ours, kv_name, name_of, tokens_in
from leankv_mlx.sizes import parse_bytes

LIMIT_VARIABLE = "LEANKV_CACHE_LIMIT"
DEFAULT_LIMIT = 10 * 10**9
_SUFFIX = ".safetensors"
_LOCK = ".lock"
_KEY = "leankv_document_key"

Note = Callable[[str], None]
"""Receives one line that the user should see."""


class Save(Protocol):
    """Writes a list of caches to a file, atomically."""

    def __call__(
        self, path: Path, caches: Sequence[Any], metadata: Mapping[str, str], /
    ) -> None: ...


class Files(NamedTuple):
    """What writes and reads the file of an entry."""

    save: Save
    load: Callable[[Path, BackendName], PromptCache]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the folder.

    Attributes:
        key: its name.
        document: that it is of; "" for the prefix of a prompt, and if its header cannot be read.
        model, kv: what it was read with; "" if its header cannot be read.
        tokens: length of the prefix.
        nbytes: of the file.
        used: when it was last written or opened, in seconds since the epoch.
    """

    key: str
    document: str
    model: str
    kv: str
    tokens: int
    nbytes: int
    used: float


def cache_limit() -> int:
    """Bytes that all entries may take: LEANKV_CACHE_LIMIT such as 20GB, 0 to keep nothing.

    Raises:
        UsageError: the variable is no size.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        return parse_bytes(text) if text else DEFAULT_LIMIT
    except UsageError as error:
        raise UsageError(f"{LIMIT_VARIABLE}: {error}") from error


class Entries:
    """The folder; the least recently used entries make room for new ones.

    Args:
        files: what writes and reads an entry.
        place: the folder.
        note: told what went wrong without being an error: the tokens are then read again, or not
            kept for the next time.
        limit: bytes of all entries; by default `cache_limit`. 0 keeps nothing and opens nothing.
    """

    def __init__(
        self, files: Files, place: Path, note: Note = lambda line: None, limit: int | None = None
    ) -> None:
        self.place = place
        self.limit = cache_limit() if limit is None else limit
        self._files = files
        self._note = note

    def path(self, key: Key) -> Path:
        """The file of an entry, whether it exists or not."""
        digest = key.digest
        earlier = self._path(digest)
        return earlier if earlier.exists() else self._path(name_of(digest, len(key.prefix)))

    def longest(self, reading: Reading, tokens: Sequence[int], above: int = 0) -> int:
        """How many of these tokens the longest stored prefix has that has more than `above` of
        them; 0 if there is none."""
        names = set(self._names()) if self.limit else set()
        lengths = {tokens_in(name) or 0 for name in names}
        asked = (length for length in lengths if above < length <= len(tokens))
        there = [n for n, digest in reading.digests(tokens, asked) if name_of(digest, n) in names]
        return there[-1] if there else 0

    def touch(self, key: Key) -> None:
        """Say that an entry was used."""
        with suppress(OSError):
            os.utime(self.path(key))

    def load(
        self, key: Key, name: str, fresh: Sequence[Any], documents: bool = False
    ) -> list[Any] | None:
        """The caches of an entry, None if they are to be made.

        Args:
            name: what to call it in a note.
            fresh: the caches that the model makes now; those of the file have to be such, and of
                the same shape where these have one.
            documents: take those of documents only. They hold what reading the prefix by itself
                gives; that of a prompt may be what was left of a longer one.
        """
        path = self.path(key)
        if not self.limit or not path.exists():
            return None
        compressed = [c for c in fresh if isinstance(c, CompressedKVCache)]
        backend = compressed[0].config.backend if compressed else "auto"
        try:
            found = self._files.load(path, backend)
        except BackendUnavailableError:
            raise
        except CacheFileError as error:
            reason = str(error.__cause__ or error)
        except Exception as error:  # a file that was kept must never stand in the way
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = _misfit(found.metadata, found.caches, key, fresh)
            if not reason and documents and not found.metadata.get("document"):
                return None
            if not reason:
                with suppress(OSError):
                    os.utime(path)
                return found.caches
        if path.exists():  # another process may have removed it meanwhile
            line = " ".join(reason.split())[:200].rstrip(".")
            self._note(f"the kept copy of {name} is not used and made anew: {line}.")
            with suppress(OSError):
                path.unlink()
        return None

    def save(
        self, key: Key, name: str, model: str, caches: Sequence[Any], document: bool = True
    ) -> bool:
        """Keep the caches of a prefix; False, with a note, if that is not possible.

        Args:
            name: what to call it, in lists too if it is a document.
            model: what to call the model in lists.
        """
        size = held([caches]).used
        if size > self.limit:
            if self.limit:
                room = f"{size / 1e6:.1f} of {self.limit / 1e6:.1f} MB"
                self._note(f"{name} is not kept: it takes {room} ({LIMIT_VARIABLE}).")
            return False
        metadata = {
            _KEY: key.digest,
            "document": name[:200] if document else "",
            "model": model,
            "kv": key.kv,
            "tokens": str(len(key.prefix)),
        }
        path = self.path(key)
        try:
            self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._writing():
                self._make_room(size, path)
                self._files.save(path, caches, metadata)
        except (CacheFileError, UnsupportedError, OSError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            reason = getattr(cause, "strerror", None) or cause
            self._note(f"{name} is not kept for the next time: {str(reason).rstrip('.')}.")
            return False
        return True

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        found = []
        for name in self._names():
            path = self._path(name)
            try:
                status = path.stat()
            except OSError:
                continue
            found.append(_entry(path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def remove(self, keys: Iterable[str]) -> int:
        """Remove entries, and what dead writers have left; the bytes that became free."""
        freed = 0
        for key in keys:
            path = self._path(key)
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CacheFileError(f"{path} cannot be removed: {error.strerror}.") from error
            freed += size
        with suppress(OSError), self._writing():
            pass
        return freed

    def _path(self, name: str) -> Path:
        return self.place / f"{name}{_SUFFIX}"

    def _names(self) -> list[str]:
        """Of all entries, in order."""
        try:
            files = sorted(os.listdir(self.place))
        except OSError:
            return []
        return [
            file.removesuffix(_SUFFIX)
            for file in files
            if file.endswith(_SUFFIX) and not file.startswith(".")
        ]

    def _make_room(self, size: int, path: Path) -> None:
        kept = []
        for file in map(self._path, filter(is_ours, self._names())):
            try:
                status = file.stat()
            except OSError:
                continue
            if file != path:
                kept.append((status.st_mtime, status.st_size, file))
        total = sum(nbytes for _, nbytes, _ in kept)
        for _, nbytes, file in sorted(kept):
            if total + size <= self.limit:
                break
            with suppress(OSError):
                file.unlink()
                total -= nbytes

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """While a file is written. The lock is shared by all writers and ends with a process, so
        whoever gets it alone knows that unfinished files belong to dead writers."""
        with (self.place / _LOCK).open("a") as lock:
            if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for file in self.place.glob(f".*{_SUFFIX}.*.tmp"):
                    if is_ours(file.name[1:].partition(_SUFFIX)[0]):
                        with suppress(OSError):
                            file.unlink()
            _locked(lock, fcntl.LOCK_SH)
            yield


def _locked(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind)
    except OSError:  # held by others, or a file system without locks: then nothing is cleaned
        return False
    return True


def _entry(path: Path, nbytes: int, used: float) -> Entry:
    said: dict[str, str] = {}
    try:
        found = json.loads(container.read_metadata(path).get("metadata", "{}"))
        said = {name: str(value) for name, value in found.items()}
    except (container.DamagedError, OSError, ValueError, AttributeError):
        pass
    tokens = said.get("tokens", "")
    return Entry(
        path.name.removesuffix(_SUFFIX),
        said.get("document", ""),
        said.get("model", ""),
        said.get("kv", ""),
        int(tokens) if tokens.isascii() and tokens.isdigit() else 0,
        nbytes,
        used,
    )


def _misfit(metadata: dict[str, str], caches: Sequence[Any], key: Key, fresh: Sequence[Any]) -> str:
    """Why the content of a file is not what its name says; "" if it is."""
    if metadata.get(_KEY) != key.digest:
        return "it belongs to another document, model or setting"
    if not alike(caches, fresh):
        return "its layers are not those of the model"
    for cache, made in zip(caches, fresh, strict=True):
        if _shape(made) not in (None, _shape(cache)):
            return "its layers have other shapes than those of the model"
    lengths = {sum(tokens_of(cache)) for cache in caches} - {0}
    if lengths not in ({len(key.prefix)}, set()):  # recurrent states do not count tokens
        return "it holds another number of tokens"
    return ""


def alike(caches: Sequence[Any], fresh: Sequence[Any]) -> bool:
    """Whether caches are such as a model makes now."""
    return [_kind(cache) for cache in caches] == [_kind(cache) for cache in fresh]


def _kind(cache: Any) -> tuple[str, str]:
    config = cache.config if isinstance(cache, CompressedKVCache) else None
    return type(cache).__name__, kv_name(config)


def _shape(cache: Any) -> tuple[int, ...] | None:
    """KV heads, channels of keys and of values; None if that is not known."""
    if isinstance(cache, CompressedKVCache):
        return None if cache.layer is None else astuple(cache.layer.shape)
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if isinstance(keys, mx.array) and isinstance(values, mx.array):
        return keys.shape[1], keys.shape[3], values.shape[3]
    return None
