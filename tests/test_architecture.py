"""What import-linter cannot see: lazy imports, submodules of other packages, GPU entry points."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leankv_mlx

PACKAGE = Path(leankv_mlx.__file__).parent
INTERNALS = "mlx_lm.models."


def sources(allowed: str) -> Iterator[tuple[Path, ast.Module]]:
    """Modules of the package outside the folder `allowed`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.is_relative_to(PACKAGE / allowed):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_importing_the_package_imports_neither_mlx_nor_mlx_lm() -> None:
    code = "import sys, leankv_mlx; print(sorted({'mlx', 'mlx.core', 'mlx_lm'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "[]"


def test_public_names_are_sorted() -> None:
    assert leankv_mlx.__all__ == sorted(leankv_mlx.__all__)


@pytest.mark.parametrize("name", leankv_mlx.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(leankv_mlx, name) is not None


def test_only_the_mlx_lm_package_imports_internals_of_mlx_lm() -> None:
    found = []
    for path, tree in sources(allowed="mlx_lm"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [f"{path}: {name}" for name in names if f"{name}.".startswith(INTERNALS)]
    assert not found


def test_only_kernels_make_gpu_kernels() -> None:
    found = []
    for path, tree in sources(allowed="kernels"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("metal_kernel", "cuda_kernel"):
                found.append(f"{path}:{node.lineno}")
    assert not found


TESTS = Path(__file__).parent
CHECKS = ("raises", "fail", "assert_allclose", "assert_array_equal")


def calls(function: ast.AST) -> set[str]:
    """Names of all that it calls."""
    found = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {getattr(f, "attr", getattr(f, "id", "")) for f in found}


def test_every_test_asserts_something() -> None:
    """Itself, or in a function of tests/ that it calls, known by its name."""
    functions = [
        (path, node)
        for path in sorted(TESTS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    asserting = set(CHECKS)
    for _ in range(3):  # a test, its helper, and what that calls
        asserting |= {
            node.name
            for _, node in functions
            if calls(node) & asserting or any(isinstance(x, ast.Assert) for x in ast.walk(node))
        }
    tests = [(path, node.name) for path, node in functions if node.name.startswith("test_")]
    assert len(tests) > 500
    assert not [f"{path}: {name}" for path, name in tests if name not in asserting]
