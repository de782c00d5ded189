"""Documents that were read before: their compressed caches in files, found by what made them.

An entry is a prompt cache file named by the digest of everything its content depends on. So an
entry of another model, setting, text or version is never looked at, and one that is damaged, or is
not what its name says, is removed and made anew. Any number of processes may use the folder: files
appear whole or not at all, and one that vanishes is only a document to read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from leankv_mlx import __version__
from leankv_mlx.cache import CompressedKVCache, container
from leankv_mlx.config import CompressionConfig, kv_text
from leankv_mlx.errors import BackendUnavailableError, CacheFileError, UnsupportedError, UsageError
from leankv_mlx.folders import folder
from leankv_mlx.mlx_lm.cache_files import load_prompt_cache, save_prompt_cache
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.mlx_lm.usage import measure
from leankv_mlx.sizes import parse_bytes

LIMIT_VARIABLE = "LEANKV_CACHE_LIMIT"
DEFAULT_LIMIT = 10 * 10**9
_SUFFIX = ".safetensors"
_LOCK = ".lock"
_KEY = "leankv_document_key"
_DIGEST = re.compile(r"[0-9a-f]{32}")

Note = Callable[[str], None]
"""Receives one line that the user should see."""


@dataclass(frozen=True, slots=True)
class Key:
    """Everything that the cache of a document's prefix depends on.

    Attributes:
        model: what tells the model and its weights from others, see `model_identity`.
        kv: the setting, "none" for the uncompressed cache.
        prefix: the tokens; the document's text, the template and the tokenizer are in them.
        chunk: tokens that were read at a time.
    """

    model: str
    kv: str
    prefix: tuple[int, ...]
    chunk: int

    @property
    def digest(self) -> str:
        """32 hex digits."""
        parts = [__version__, container.VERSION, self.model, self.kv, self.chunk, self.prefix]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache.

    Attributes:
        key: its name.
        document, model, kv: what it is of; "" if its header cannot be read.
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


def model_identity(path: Path) -> str:
    """What tells a model and its weights from others, cheaply: weights that are edited in place
    get another time, and those that were trained on differ where `fingerprint` looks."""
    times = [file.stat().st_mtime_ns for file in sorted(path.glob("*.safetensors"))]
    return f"{fingerprint(path)} {times}"


def kv_name(config: CompressionConfig | None) -> str:
    """The setting as a key has it: what computes it is no part of it."""
    return kv_text(None if config is None else config.portable)


def cache_limit() -> int:
    """Bytes that the cache may take: LEANKV_CACHE_LIMIT such as 20GB, 0 to keep nothing.

    Raises:
        UsageError: the variable is no size.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        return parse_bytes(text) if text else DEFAULT_LIMIT
    except UsageError as error:
        raise UsageError(f"{LIMIT_VARIABLE}: {error}") from error


def is_ours(key: str) -> bool:
    """Whether an entry has such a name as is given here; others are the user's own files."""
    return _DIGEST.fullmatch(key) is not None


class DocumentCache:
    """A folder of entries, the least recently used of which make room for new ones.

    Args:
        note: told what went wrong without being an error: the document is then read again, or not
            kept for the next time.
        place: the folder; by default the user's.
        limit: bytes of all entries; by default `cache_limit`. 0 keeps nothing and opens nothing.
    """

    def __init__(
        self, note: Note = lambda line: None, place: Path | None = None, limit: int | None = None
    ) -> None:
        self.place = folder("cache") / "documents" if place is None else place
        self.limit = cache_limit() if limit is None else limit
        self._note = note

    def path(self, key: Key) -> Path:
        """The file of an entry, whether it exists or not."""
        return self.place / f"{key.digest}{_SUFFIX}"

    def load(self, key: Key, name: str, fresh: Sequence[Any]) -> list[Any] | None:
        """The caches of a document, None if they are to be made.

        Args:
            name: what to call the document in a note.
            fresh: the caches that the model makes now; those of the file have to be such, and of
                the same shape where these have one.
        """
        path = self.path(key)
        if not self.limit or not path.exists():
            return None
        compressed = [c for c in fresh if isinstance(c, CompressedKVCache)]
        backend = compressed[0].config.backend if compressed else "auto"
        try:
            found = load_prompt_cache(path, backend)
        except BackendUnavailableError:
            raise
        except CacheFileError as error:
            reason = str(error.__cause__ or error)
        except Exception as error:  # a file that was kept must never stand in the way
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = _misfit(found.metadata, found.caches, key, fresh)
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

    def save(self, key: Key, name: str, model: str, caches: Sequence[Any]) -> bool:
        """Keep the caches of a document; False, with a note, if that is not possible.

        Args:
            name: what to call the document, in lists too.
            model: what to call the model in lists.
        """
        size = measure(caches).used
        if size > self.limit:
            if self.limit:
                room = f"{size / 1e6:.1f} of {self.limit / 1e6:.1f} MB"
                self._note(f"{name} is not kept: it takes {room} ({LIMIT_VARIABLE}).")
            return False
        metadata = {
            _KEY: key.digest,
            "document": name[:200],
            "model": model,
            "kv": key.kv,
            "tokens": str(len(key.prefix)),
        }
        path = self.path(key)
        try:
            self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._writing():
                self._make_room(size, path)
                save_prompt_cache(path, caches, metadata)
        except (CacheFileError, UnsupportedError, OSError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            reason = getattr(cause, "strerror", None) or cause
            self._note(f"{name} is not kept for the next time: {str(reason).rstrip('.')}.")
            return False
        return True

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        found = []
        for path in self._files():
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
            path = self.place / f"{key}{_SUFFIX}"
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

    def _files(self) -> list[Path]:
        try:
            return sorted(self.place.glob(f"[!.]*{_SUFFIX}"))
        except OSError:
            return []

    def _make_room(self, size: int, path: Path) -> None:
        kept = []
        for file in self._files():
            try:
                status = file.stat()
            except OSError:
                continue
            if file != path and is_ours(file.stem):
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
                    if is_ours(file.name[1:33]):
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
    if [_kind(cache) for cache in caches] != [_kind(cache) for cache in fresh]:
        return "its layers are not those of the model"
    for cache, made in zip(caches, fresh, strict=True):
        if _shape(made) not in (None, _shape(cache)):
            return "its layers have other shapes than those of the model"
    lengths = {measure([cache]).tokens for cache in caches} - {0}
    if lengths not in ({len(key.prefix)}, set()):  # recurrent states do not count tokens
        return "it holds another number of tokens"
    return ""


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
