"""Runs a built kernel on arrays, in the order asked for, and collects the reports."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.msl import compiler
from tests.msl.source import Source, line_of

FORWARD, REVERSE, RANDOM = range(3)
_MESSAGES = 16384


@dataclass(frozen=True)
class Run:
    """How to run.

    Attributes:
        order: of threads and threadgroups.
        seed: of the random order.
        jitter: if not 0, fast math is off by a few units in the last place, differently for each.
    """

    check: bool = True
    order: int = FORWARD
    seed: int = 1
    jitter: int = 0


@dataclass(frozen=True)
class Result:
    """Outputs by name; `reports` is empty if nothing is wrong."""

    outputs: dict[str, NDArray[Any]]
    reports: str


def dispatch(
    library: Path,
    source: Source,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Mapping[str, tuple[tuple[int, ...], Any]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    run: Run,
) -> Result:
    """One dispatch. `outputs` has the shape and NumPy dtype of each."""
    lib = compiler.runtime()
    lib.msl_allocate.restype = lib.msl_dispatch.restype = ctypes.c_void_p
    arrays = {name: inputs.get(name) for name in source.buffers if name}
    sizes = {
        name: _bytes(*outputs[name]) if array is None else array.nbytes
        for name, array in arrays.items()
    }
    sizes[""] = 0  # a number that the kernel does not use
    memory = {name: lib.msl_allocate(ctypes.c_size_t(max(1, size))) for name, size in sizes.items()}
    try:
        for name, array in arrays.items():
            if array is None:
                ctypes.memset(memory[name], 0xCB, sizes[name])
            elif array.nbytes:
                whole = np.ascontiguousarray(array)
                ctypes.memmove(memory[name], whole.ctypes.data, whole.nbytes)
        text = _call(lib, library, source, memory, sizes, outputs, grid, threadgroup, run)
        results = {
            name: np.frombuffer(ctypes.string_at(memory[name], sizes[name]), dtype).reshape(shape)
            for name, (shape, dtype) in outputs.items()
        }
    finally:
        for name, address in memory.items():
            lib.msl_free(ctypes.c_void_p(address), ctypes.c_size_t(max(1, sizes[name])))
    return Result(results, re.sub(r"@0x[0-9a-f]+", lambda m: _place(library, source, m[0]), text))


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _call(
    lib: ctypes.CDLL,
    library: Path,
    source: Source,
    memory: Mapping[str, int],
    sizes: Mapping[str, int],
    outputs: Mapping[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    run: Run,
) -> str:
    names = source.buffers
    about = (ctypes.c_void_p * 5)()
    _load(library).msl_library(about)
    messages = ctypes.create_string_buffer(_MESSAGES)
    lib.msl_dispatch(
        about,
        (ctypes.c_void_p * len(names))(*(memory[name] for name in names)),
        len(names),
        (ctypes.c_size_t * len(names))(*(sizes[name] for name in names)),
        (ctypes.c_int * len(names))(*(name in outputs for name in names)),
        (ctypes.c_char_p * len(names))(*(name.encode() for name in names)),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        run.order,
        ctypes.c_uint64(run.seed),
        run.jitter,
        int(run.check),
        messages,
        ctypes.c_size_t(_MESSAGES),
    )
    return messages.value.decode().strip()


@lru_cache(maxsize=512)
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _place(library: Path, source: Source, address: str) -> str:
    """The line of the kernel at "@0x...", where a tool can tell it."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if not tool:
        return address
    command = [tool, "-ie", str(library), address[1:]]
    for place in subprocess.run(command, capture_output=True, text=True).stdout.split("\n"):
        if match := re.search(r"kernel\.metal:(\d+)", place):
            return f"in line {match[1]}: {line_of(source, int(match[1]))}"
    return address
