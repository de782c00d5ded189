"""The header of a GGUF file: its metadata, and where each tensor lies.

    4 bytes     "GGUF"
    uint32      version, 2 or 3
    uint64      number of tensors, number of metadata entries
    entries     key (text), type (uint32), value
    tensors     name (text), number of dimensions (uint32), dimensions (uint64, columns first),
                type (uint32), offset from the beginning of the data (uint64)
    data        from the next multiple of the alignment on

Numbers are little endian, a text is its length (uint64) and its UTF-8, an array its type (uint32),
its length (uint64) and its values. Nothing in a file is trusted: every count is checked against
the bytes that are left before anything is allocated, and what is read takes at most twice the
file's size in memory.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_TEXT = 1 << 24
_DEFAULT_ALIGNMENT = 32
_SMALL = 1 << 20  # bytes of memory that even the smallest file may take

_BOOL, _TEXT, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_LEAST_ENTRY = 8 + 4 + 1  # bytes in the file
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8
_ENTRY_MEMORY, _TENSOR_MEMORY = 200, 600  # bytes of the Python objects, without texts


class FlawError(ValueError):
    """What is wrong with a file's content; whoever reads the file adds its name."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        shape: rows first, columns last.
        kind: name of its type, for example "Q4_K".
        block: elements of a block, which divides the columns.
        offset: from the beginning of the file.
        nbytes: in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    block: int
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of columns."""
        return self.nbytes // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        metadata: numbers, bools, texts, lists of texts, and NumPy arrays of numbers.
        tensors: by name, in the file's order; they lie within the file and do not overlap.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def has_magic(path: Path) -> bool:
    """Whether a file calls itself GGUF; False if it cannot be read."""
    try:
        with open_file(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, FlawError):
        return False


def open_file(path: Path) -> BinaryIO:
    """A regular file, for reading; a pipe, which could make us wait for ever, is a FlawError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FlawError("it is no file")
    return open(handle, "rb")


def read_header(file: BinaryIO) -> Header:
    """Read and check a header; the file is read from where it stands, its beginning.

    Raises:
        FlawError: the file is damaged, of another kind, or of a version that is not read here.
        OSError: it cannot be read.
    """
    reader = _Reader(file)
    if reader.take(len(MAGIC)) != MAGIC:
        raise FlawError("it is no GGUF file")
    version = reader.uint32()
    if version not in _VERSIONS:
        raise FlawError(_unknown_version(version))
    tensors, entries = reader.uint64(), reader.uint64()
    reader.check_room(tensors * _LEAST_TENSOR + entries * _LEAST_ENTRY)
    reader.charge(tensors * _TENSOR_MEMORY + entries * _ENTRY_MEMORY)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.text()
        if key in metadata:
            raise FlawError(f"it has two entries {_shown(key)}")
        metadata[key] = reader.value(reader.uint32())
    rows = [reader.tensor() for _ in range(tensors)]
    return Header(metadata, _placed(rows, _alignment(metadata), reader))


def _unknown_version(version: int) -> str:
    if version & 0xFFFF == 0 and version >> 24 in _VERSIONS:
        return "it is big-endian, and only little-endian files are read"
    return f"it has GGUF version {version}, and versions 2 and 3 are read"


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise FlawError(f"its alignment is {_shown(alignment)}, which is no power of two")
    return alignment


def _placed(rows: list[Tensor], alignment: int, reader: _Reader) -> dict[str, Tensor]:
    """The tensors with offsets from the beginning of the file, each checked to lie in it."""
    data = -(-reader.position // alignment) * alignment
    placed: dict[str, Tensor] = {}
    for row in rows:
        if row.name in placed:
            raise FlawError(f"it has two tensors {_shown(row.name)}")
        if row.offset % alignment:
            raise FlawError(
                f"the tensor {_shown(row.name)} does not lie at a multiple of {alignment}"
            )
        begin = data + row.offset
        if begin + row.nbytes > reader.size:
            raise FlawError(f"it is cut off: the tensor {_shown(row.name)} goes on behind its end")
        placed[row.name] = Tensor(row.name, row.shape, row.kind, row.block, begin, row.nbytes)
    end = data
    for row in sorted(placed.values(), key=lambda row: row.offset):
        if row.offset < end:
            raise FlawError(f"the tensor {_shown(row.name)} overlaps another one")
        end = row.offset + row.nbytes
    return placed


class _Reader:
    """Reads values one after the other, never more than the file has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._memory = max(2 * self.size, _SMALL)

    def check_room(self, nbytes: int) -> None:
        """Whether that many bytes are left at all."""
        if nbytes > self.size - self.position:
            raise FlawError("it is cut off or damaged: its header asks for more than the file has")

    def charge(self, nbytes: int) -> None:
        """Count memory that is about to be taken."""
        self._memory -= nbytes
        if self._memory < 0:
            raise FlawError("its header would take more memory than twice the file")

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        self.check_room(nbytes)
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise FlawError("it became shorter while it was read")
        self.position += nbytes
        return data

    def uint32(self) -> int:
        """The next four bytes."""
        return int(struct.unpack("<I", self.take(4))[0])

    def uint64(self) -> int:
        """The next eight bytes."""
        return int(struct.unpack("<Q", self.take(8))[0])

    def text(self) -> str:
        """A length and its UTF-8."""
        length = self.uint64()
        self.check_room(length)
        if length > _MAX_TEXT:
            raise FlawError(f"it has a text of {length:,} bytes")
        try:
            text = self.take(length).decode()
        except UnicodeDecodeError as error:
            raise FlawError("it has a text that is no UTF-8") from error
        self.charge(sys.getsizeof(text))
        return text

    def value(self, kind: int) -> Any:
        """A value of a type of metadata."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        number = self._numbers(kind, 1)[0]
        if kind == _BOOL:
            return bool(number)
        return number.item()

    def _array(self) -> Any:
        kind, count = self.uint32(), self.uint64()
        if kind == _ARRAY:
            raise FlawError("it has an array of arrays")
        if kind != _TEXT:
            return self._numbers(kind, count)
        self.check_room(8 * count)
        self.charge(8 * count)
        return [self.text() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray[Any, Any]:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            raise FlawError(f"it has metadata of the unknown type {kind}")
        self.check_room(count * dtype.itemsize)
        self.charge(count * dtype.itemsize)
        numbers = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind != _BOOL:
            return numbers
        if numbers.max(initial=0) > 1:
            raise FlawError("it has a bool that is neither 0 nor 1")
        return numbers.view(np.bool_)

    def tensor(self) -> Tensor:
        """A row of the list of tensors; its offset is still that from the beginning of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self.text(), self.uint32()
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise FlawError(f"the tensor {_shown(name)} has {dimensions} dimensions")
        shape = tuple(self.uint64() for _ in range(dimensions))[::-1]
        number, offset = self.uint32(), self.uint64()
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise FlawError(f"the tensor {_shown(name)} has the unknown type {number}") from error
        if not all(shape) or shape[-1] % block:
            raise FlawError(f"the tensor {_shown(name)} has the impossible shape {shape}")
        return Tensor(
            name, shape, kind.name, block, offset, math.prod(shape) // block * block_bytes
        )


def _shown(value: object) -> str:
    """A name or value from the file, as a message can have it."""
    return repr(value)[:80]
