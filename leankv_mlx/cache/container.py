"""A safetensors file with a digest over every byte, written atomically and never mapped.

    8 bytes     length of the header, little endian
    header      JSON, padded with spaces; starts with its kind's magic, the digest's 64 hex digits,
                and `"`
    tensors     back to back, in the order of the header

The digest is BLAKE2b-256 of the whole file with its own digits as zeros. Any safetensors reader
opens the file; this one trusts nothing in it: all sizes are checked against the file's before
anything is allocated, and the digest before any array is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from leankv_mlx.atomic import replacing
from leankv_mlx.errors import CacheFileError, UnsupportedError

FORMAT = "leankv-prompt-cache"
VERSION = 3
BEFORE_EQUALIZE = ("2",)
"""Earlier versions that are read too: settings without a word on `equalize` mean off there."""


class Kind(NamedTuple):
    """What a file is: how it calls itself, the version that is written, earlier ones that are read
    too, and what a message calls it."""

    format: str
    version: int
    earlier: tuple[str, ...]
    called: str

    @property
    def magic(self) -> bytes:
        """How the header begins; the digest follows."""
        return f'{{"__metadata__":{{"format":"{self.format}","digest":"'.encode()

    @property
    def digest_at(self) -> int:
        """Where the digest is in the file."""
        return 8 + len(self.magic)


PROMPT_CACHE = Kind(FORMAT, VERSION, BEFORE_EQUALIZE, "prompt cache")

_ZEROS = b"0" * 64
_MAX_HEADER = 1 << 22  # JSON takes up to 30 times its bytes in memory
_MAX_ELEMENTS = 1 << 40
_MAX_DIMENSION = 2**31 - 1  # of an MLX array

# name in the header -> (dtype, NumPy's dtype of the same bytes)
_DTYPES: dict[str, tuple[mx.Dtype, Any]] = {
    "BOOL": (mx.bool_, np.bool_),
    "U8": (mx.uint8, np.uint8),
    "I8": (mx.int8, np.int8),
    "U16": (mx.uint16, np.uint16),
    "I16": (mx.int16, np.int16),
    "U32": (mx.uint32, np.uint32),
    "I32": (mx.int32, np.int32),
    "I64": (mx.int64, np.int64),
    "F16": (mx.float16, np.float16),
    "BF16": (mx.bfloat16, np.uint16),
    "F32": (mx.float32, np.float32),
}


class DamagedError(ValueError):
    """What is wrong with a file's content; `CacheFileError` adds the file and the way out."""


@dataclass(frozen=True)
class _Tensor:
    """One row of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def has_magic(path: str | Path) -> bool:
    """Whether a file calls itself a prompt cache of this package; False if it cannot be read."""
    try:
        with _open(Path(path)) as file:
            file.seek(8)
            return file.read(len(PROMPT_CACHE.magic)) == PROMPT_CACHE.magic
    except (OSError, DamagedError):
        return False


def write(
    path: str | Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    kind: Kind = PROMPT_CACHE,
) -> None:
    """Replace a file, or leave it as it is if anything fails or the process dies.

    Raises:
        CacheFileError: the folder is missing or cannot be written, or the disk is full.
        UnsupportedError: a tensor has a dtype that the format does not know, or the metadata is
            too long.
    """
    header = _header(tensors, metadata, kind)
    try:
        _replace(Path(path), header, tensors, kind.digest_at)
    except OSError as error:
        raise CacheFileError(
            f"cannot write {path}: {error.strerror or error}; name another file or make room."
        ) from error


def _replace(path: Path, header: bytes, tensors: Mapping[str, mx.array], digest_at: int) -> None:
    with replacing(path) as file:
        digest = hashlib.blake2b(header, digest_size=32)
        file.write(header)
        for array in tensors.values():
            data = _data(array)
            digest.update(data)
            file.write(data)
        file.seek(digest_at)
        file.write(digest.hexdigest().encode())


def _header(tensors: Mapping[str, mx.array], metadata: Mapping[str, str], kind: Kind) -> bytes:
    own = {"format": kind.format, "digest": _ZEROS.decode(), "version": str(kind.version)}
    header: dict[str, Any] = {"__metadata__": {**own, **metadata}}
    begin = 0
    for name, array in tensors.items():
        end = begin + array.nbytes
        header[name] = {
            "dtype": _dtype_name(array),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise UnsupportedError(
            f"a {kind.called} file cannot hold {len(text):,} bytes of layers and metadata; "
            f"at most {_MAX_HEADER:,} fit."
        )
    return len(text).to_bytes(8, "little") + text


def _dtype_name(array: mx.array) -> str:
    for name, (dtype, _) in _DTYPES.items():
        if dtype == array.dtype:
            return name
    raise UnsupportedError(f"a prompt cache file cannot hold arrays of dtype {array.dtype}.")


def _data(array: mx.array) -> Any:
    """Its bytes, as a buffer."""
    plain = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return np.ascontiguousarray(plain).reshape(-1).view(np.uint8)


def read(path: str | Path, kind: Kind = PROMPT_CACHE) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors and metadata of a file that `write` made.

    Raises:
        DamagedError: it is anything else, or a single bit has changed.
        OSError: it cannot be read.
    """
    with _open(Path(path)) as file:
        length, header = _read_header(file, kind)
        metadata, rows = _parse(header, os.fstat(file.fileno()).st_size - 8 - len(header), kind)
        own = header[len(kind.magic) : len(kind.magic) + 64]
        digest = hashlib.blake2b(length, digest_size=32)
        digest.update(kind.magic + _ZEROS + header[len(kind.magic) + 64 :])
        pieces = []
        for row in rows:
            data = file.read(row.end - row.begin)
            if len(data) != row.end - row.begin:
                raise DamagedError("it is cut off")
            digest.update(data)
            pieces.append(data)
    if digest.hexdigest().encode() != own:
        raise DamagedError("its digest does not fit its content")
    pieces.reverse()
    # Each piece goes as its array comes, so the content is never held twice.
    return {row.name: _array(pieces.pop(), row) for row in rows}, metadata


def read_metadata(path: str | Path, kind: Kind = PROMPT_CACHE) -> dict[str, str]:
    """The metadata alone, for lists: its digest is not checked.

    Raises:
        DamagedError: the header is not one that `write` made.
        OSError: it cannot be read.
    """
    with _open(Path(path)) as file:
        _, header = _read_header(file, kind)
        return _parse(header, os.fstat(file.fileno()).st_size - 8 - len(header), kind)[0]


def _open(path: Path) -> BinaryIO:
    # Not blocking, and asked before the first read: a pipe could make us wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedError("it is no file")
    return open(handle, "rb")


def _read_header(file: BinaryIO, kind: Kind) -> tuple[bytes, bytes]:
    """The eight bytes of the length, and the header itself."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > _MAX_HEADER:
        raise DamagedError(f"it is no {kind.called} of leankv")
    header = file.read(size)
    if not header.startswith(kind.magic):
        raise DamagedError(f"it is no {kind.called} of leankv")
    if len(header) < size:
        raise DamagedError("it is cut off")
    return length, header


def _parse(header: bytes, data_size: int, kind: Kind) -> tuple[dict[str, str], list[_Tensor]]:
    try:
        content = json.loads(header.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise DamagedError("its header is damaged") from error
    if not isinstance(content, dict) or not isinstance(content.get("__metadata__"), dict):
        raise DamagedError("its header is damaged")
    metadata = content.pop("__metadata__")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError("its header is damaged")
    version = metadata.get("version", "")
    if version not in (*kind.earlier, str(kind.version)):
        raise DamagedError(
            f"it has format version {version[:20]!r} and this leankv-mlx reads {kind.version}, "
            "so another version of the package wrote it"
        )
    rows = sorted(map(_row, content.items()), key=lambda row: (row.begin, row.end))
    for expected, row in zip(_starts(rows), rows, strict=False):
        if row.begin != expected:
            raise DamagedError("its tensors overlap or leave gaps")
    if data_size != (rows[-1].end if rows else 0):
        raise DamagedError("its length does not fit its header")
    return metadata, rows


def _starts(rows: list[_Tensor]) -> Iterator[int]:
    yield 0
    for row in rows:
        yield row.end


def _row(item: tuple[str, Any]) -> _Tensor:
    name, row = item
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise DamagedError("its header is damaged")
    dtype, shape, span = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DamagedError("it has a tensor of unknown dtype")
    if not _integers(shape) or not _integers(span) or len(shape) > 8 or len(span) != 2:
        raise DamagedError("it has a tensor with an impossible shape")
    nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype][1]).itemsize
    # Dimensions beside a zero count too: they cost no bytes, but make arrays that nothing can use.
    large = math.prod(filter(None, shape)) >= _MAX_ELEMENTS
    if large or max(shape, default=0) > _MAX_DIMENSION or span[1] - span[0] != nbytes:
        raise DamagedError("it has a tensor with an impossible shape")
    return _Tensor(name, dtype, tuple(shape), *span)


def _integers(values: Any) -> bool:
    """Whether it is a list of whole numbers, none of them negative."""
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)


def _array(data: bytes, row: _Tensor) -> mx.array:
    dtype, plain = _DTYPES[row.dtype]
    array = mx.array(np.frombuffer(data, plain).reshape(row.shape))
    return array.view(dtype) if dtype == mx.bfloat16 else array
