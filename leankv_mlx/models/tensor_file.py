"""A safetensors file that is written piece by piece, so that no tensor has to be held whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}


_MAX_HEADER = 1 << 24


def has_all(path: Path) -> bool:
    """Whether a file is there and as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            rows = json.loads(file.read(length)) if length <= _MAX_HEADER else {}
            ends = [row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__"]
            return bool(ends) and os.fstat(file.fileno()).st_size == 8 + length + max(ends)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return False


class TensorFile:
    """A new file; used as a context.

    Args:
        tensors: name -> (dtype, shape) of all that will be written.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self._places = {
            name: data + entry["data_offsets"][0]
            for name, entry in header.items()
            if name in tensors
        }
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, row: int, rows: np.ndarray[Any, Any]) -> None:
        """Put rows of a tensor where they belong.

        Args:
            row: the first of them.
            rows: [n, ...], of the bytes per item that the tensor's dtype has.
        """
        self._file.seek(self._places[name] + row * (rows.nbytes // len(rows)))
        self._file.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
