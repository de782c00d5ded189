"""MLX's own Metal headers: the macOS wheel of this very version of MLX carries them.

They are downloaded once, into build/; `$LEANKV_MLX_METAL` names a wheel that is there already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from tests.msl import compiler

_FOLDER = "mlx/include/mlx/backend/metal/kernels/"
_INCLUDE = re.compile(r'^#include "(mlx/backend/metal/kernels/[^"]+)"$', re.M)


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """Name below `_FOLDER` -> text.

    Raises:
        OSError: they cannot be had here, with the reason.
    """
    with zipfile.ZipFile(_wheel()) as wheel:
        return {
            name.removeprefix(_FOLDER): wheel.read(name).decode()
            for name in wheel.namelist()
            if name.startswith(_FOLDER) and name.count("/") == _FOLDER.count("/")
        }


def _wheel() -> Path:
    if named := os.environ.get("LEANKV_MLX_METAL"):
        return Path(named)
    target = compiler.BUILD / "wheels"
    wanted = f"mlx-metal=={version('mlx').split('+')[0]}"
    found = sorted(target.glob(wanted.replace("-", "_").replace("==", "-") + "-*.whl"))
    if not found:
        command = [
            sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--quiet",
            "--platform", "macosx_14_0_arm64", "--only-binary=:all:", "--dest", str(target),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise OSError(f"{wanted} for macOS did not download in time.") from None
        if done.returncode:
            raise OSError(f"{wanted} for macOS cannot be downloaded here.")
        found = sorted(target.glob("*.whl"))
    return found[-1]


def prelude() -> str:
    """utils.h with what it includes, as MLX's JIT puts it in front of a kernel."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        ours = compiler.INCLUDE / "mlx/backend/metal/kernels" / name
        content = ours.read_text() if ours.exists() else headers()[name]
        content = content.replace("#pragma once", "")
        return _INCLUDE.sub(
            lambda m: text(m[1].removeprefix("mlx/backend/metal/kernels/")), content
        )

    # An array parameter in another address space is a pointer to clang only if it is spelled so.
    return re.sub(
        r"constant const int64_t strides\[\d\]", "constant const int64_t* strides", text("utils.h")
    )


def attention() -> str:
    """MLX's decode attention, the kernel `sdpa_vector` alone, without masks and sinks."""
    text = headers()["sdpa_vector.h"]
    text = text[: text.index("template <typename T, int D, int V = D, int TK")]
    text = re.sub(
        r"constant (\w+ \w+) \[\[function_constant\(\d+\)\]\];", r"constant \1 = 0;", text
    )
    # Threadgroup variables of a kernel need the harness's storage, as TG_ARRAY gives it to ours.
    return re.sub(r"^(\s+)(threadgroup \w+ \w+\[)", r"\1MSL_TG_STORAGE \2", text, flags=re.M)
