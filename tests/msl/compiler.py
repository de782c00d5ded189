"""Finds a C++ compiler for kernels and builds libraries with it.

Clang is needed, for the address spaces: `$LEANKV_CLANG`, clang++ of version 18 or newer, or else
the one that PyPI's ziglang brings.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "msl"
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"

KERNEL = (
    "-isystem", str(INCLUDE), "-include", "metal_stdlib", "-fPIC",
    "-Wall", "-Werror=uninitialized", "-Werror=sometimes-uninitialized",
    "-Werror=conditional-uninitialized", "-Werror=double-promotion", "-Werror=return-type",
    "-Wno-unknown-attributes", "-Wno-duplicate-decl-specifier", "-Wno-unused-variable",
    "-Wno-unknown-pragmas",
    # A GPU computes half and float as written; garbage in what was not initialised.
    "-ffp-contract=off", "-Xclang", "-ffloat16-excess-precision=none",
    "-Xclang", "-fbfloat16-excess-precision=none", "-ftrivial-auto-var-init=pattern",
)  # fmt: skip
METAL_CXX = ("-std=c++14", "-Werror=c++17-extensions", "-Werror=c++20-extensions")
"""The C++ that Metal 3 has."""
FAST = ("-O2",)
CHECK = (  # not optimized: a kernel is compiled once and runs for less long than that takes
    "-O0", "-g", "-fsanitize=thread", "-mllvm", "-tsan-instrument-read-before-write=1",
    "-mllvm", "-tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,shift,integer-divide-by-zero,float-cast-overflow,signed-integer-overflow",
    "-fno-sanitize-trap=all", "-fsanitize-recover=all",
)  # fmt: skip
LINK = ("-shared", "-nostdlib++", "-Wl,-Bsymbolic")
CLANG = 18


class CompileError(Exception):
    """What the compiler said."""


@lru_cache(maxsize=1)
def compiler() -> tuple[str, ...] | None:
    """The command, or None."""
    if not sys.platform.startswith("linux"):
        return None  # the runtime knows ELF
    if named := os.environ.get("LEANKV_CLANG"):
        return tuple(named.split())
    for name in ("clang++", *(f"clang++-{version}" for version in range(24, CLANG - 1, -1))):
        if (path := shutil.which(name)) and _version(path) >= CLANG:
            return (path,)
    spec = importlib.util.find_spec("ziglang")
    if spec and spec.origin:
        return (str(Path(spec.origin).parent / "zig"), "c++", "-fno-sanitize=undefined")
    return None


def _version(clang: str) -> int:
    text = subprocess.run([clang, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"clang version (\d+)", text)
    return int(match[1]) if match and "Apple" not in text else 0


def build_kernel(cpp: str, *, check: bool, flags: tuple[str, ...] = METAL_CXX) -> Path:
    """A library of one kernel; built once for each text.

    Raises:
        CompileError: it does not compile.
    """
    return _build([], cpp, (*KERNEL, *flags, *(CHECK if check else FAST)), _hash_of(INCLUDE))


@lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL:
    """The runtime, loaded so that kernel libraries find its functions."""
    sources = sorted(RUNTIME.glob("*.cpp"))
    flags = ("-DMSL_UCONTEXT",) if os.environ.get("LEANKV_MSL_UCONTEXT") else ()
    options = ("-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-Wall", *flags)
    library = _build(sources, "", options, _hash_of(RUNTIME) + _hash_of(INCLUDE))
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _build(sources: list[Path], text: str, options: tuple[str, ...], dependencies: str) -> Path:
    command = compiler()
    if command is None:
        raise CompileError("there is no compiler for kernels here")
    key = hashlib.sha256(repr((text, sources, options, command, dependencies)).encode())
    target = BUILD / f"{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:  # another worker may build the same
        scratch = Path(folder)
        files = list(sources)
        if text:
            files = [scratch / "kernel.cpp"]
            files[0].write_text(text)
        objects = [str(scratch / f"{i}.o") for i in range(len(files))]
        # Compiled and linked apart: zig would link a sanitizer's runtime.
        for file, target_file in zip(files, objects, strict=True):
            _run([*command, *options, "-c", str(file), "-o", target_file])
        library = scratch / "library.so"
        _run([*command, *LINK, *objects, "-o", str(library), "-lm"])
        library.replace(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)


def _hash_of(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
