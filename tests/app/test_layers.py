"""The app stands on the engine; what runs the model stays in the engine's thread."""

from __future__ import annotations

import ast
from pathlib import Path

APP = Path(__file__).parents[2] / "app"
ALLOWED = {
    "leankv_mlx", "leankv_mlx.atomic", "leankv_mlx.blas", "leankv_mlx.cli", "leankv_mlx.config",
    "leankv_mlx.documents", "leankv_mlx.engine", "leankv_mlx.errors", "leankv_mlx.faults",
    "leankv_mlx.folders", "leankv_mlx.terminal",
    "leankv_mlx.profiles", "leankv_mlx.sizes",
}  # fmt: skip


def imported(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def test_the_app_knows_the_engine_only() -> None:
    found = []
    for path in sorted(APP.rglob("*.py")):
        for name in imported(path):
            package = ".".join(name.split(".")[:2])
            if name.startswith("leankv_mlx") and package not in ALLOWED:
                found.append(f"{path}: {name}")
            if name.split(".")[0] in ("mlx", "mlx_lm"):
                found.append(f"{path}: {name}")
    assert not found


def test_files_stay_small() -> None:
    long = [path for path in APP.rglob("*.py") if len(path.read_text().splitlines()) > 400]
    assert not long
