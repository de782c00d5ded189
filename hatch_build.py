"""Build hook: what the wheel holds besides the package leankv_mlx, and the native extension.

The extension is built where a C++ compiler is, and left out elsewhere: the package then uses the
reference backend. LEANKV_NATIVE=0 leaves it out, LEANKV_NATIVE=1 makes a failure an error.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WHEEL = {"standard"}
BOTH = {"standard", "editable"}

# path in the repository -> (path in the wheel, the builds it goes into: "standard" is the wheel,
# "editable" an editable install, where resources.py finds the repository's own files)
FILES = {
    "models.toml": ("leankv_mlx/models.toml", WHEEL),
    "metal": ("leankv_mlx/metal", WHEEL),
    "app": ("leankv_app", WHEEL),
    "leankv_mlx_hook.pth": ("leankv_mlx_hook.pth", BOTH),
}

APP_SHIM = '''\
"""Editable install: leankv_app is the app/ folder of the repository."""
import sys
from importlib.util import module_from_spec, spec_from_file_location

_spec = spec_from_file_location(__name__, {init!r}, submodule_search_locations=[{folder!r}])
sys.modules[__name__] = _module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
'''


TOOLS = ["cmake>=3.24", "mlx[cpu]>=0.32.4,<0.33", "nanobind==3.1.0", "ninja"]
"""What building the extension takes besides a compiler; nanobind's version is that of mlx's own
bindings, because the two share the type of arrays."""


class CustomBuildHook(BuildHookInterface):
    def dependencies(self) -> list[str]:
        return TOOLS if not _obstacle(Path(self.root)) else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        include = build_data["force_include"]
        root = Path(self.root)
        for source, (target, versions) in FILES.items():
            if version in versions and _has_files(root / source):
                include[str(root / source)] = target
        app = root / "app"
        if version == "editable" and _has_files(app):
            self._scratch = tempfile.TemporaryDirectory()
            shim = Path(self._scratch.name, "leankv_app.py")
            shim.write_text(APP_SHIM.format(init=str(app / "__init__.py"), folder=str(app)))
            include[str(shim)] = shim.name
        if version in ("standard", "editable"):
            self._add_extension(root, version, build_data)

    def _add_extension(self, root: Path, version: str, build_data: dict[str, Any]) -> None:
        self._built = tempfile.TemporaryDirectory()
        # An editable install runs from the repository, so that is where the extension goes.
        target = root if version == "editable" else Path(self._built.name, "install")
        reason = _obstacle(root) or _build(root, Path(self._built.name, "build"), target)
        if reason:
            if os.environ.get("LEANKV_NATIVE") == "1":
                raise RuntimeError(f"the native CPU extension cannot be built: {reason}")
            self.app.display_warning(f"Without the native CPU extension: {reason}")
        elif version == "standard":
            for file in (target / "leankv_mlx").glob("*.so"):
                build_data["force_include"][str(file)] = f"leankv_mlx/{file.name}"
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def _has_files(path: Path) -> bool:
    return path.is_file() or any(entry.is_file() for entry in path.rglob("*"))


def _obstacle(root: Path) -> str | None:
    """Why the extension is not even tried; None if it is."""
    if os.environ.get("LEANKV_NATIVE") == "0":
        return "LEANKV_NATIVE=0."
    if not sys.platform.startswith("linux"):
        return "it is for Linux; macOS has the GPU."
    if not (root / "CMakeLists.txt").is_file():
        return "its sources are not here."
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names if name):
        return "there is no C++ compiler."
    return None


def _build(root: Path, build: Path, target: Path) -> str | None:
    """Build and install into `target`/leankv_mlx; returns why not."""
    missing = [name for name in ("mlx", "nanobind") if not importlib.util.find_spec(name)]
    cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
    if missing or not cmake:
        return f"{', '.join(missing or ['cmake'])} not found by {sys.executable}."
    configure = [cmake, "-S", str(root), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (
        configure,
        [cmake, "--build", str(build), "--parallel"],
        [cmake, "--install", str(build), "--prefix", str(target)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command[:2])} failed:\n{(done.stdout + done.stderr)[-3000:]}"
    return None


def _tool(name: str, folder: str) -> str | None:
    """A program from its Python package, else from PATH."""
    if importlib.util.find_spec(name):
        path = Path(getattr(importlib.import_module(name), folder, ""), name)
        if path.is_file():
            return str(path)
    return shutil.which(name)
