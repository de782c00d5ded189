"""The built wheels: what they hold, and that an installed one works away from the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from leankv_mlx.resources import bases, masks

REPOSITORY = Path(__file__).parents[2]
HOOK = "leankv_mlx_hook.pth"

pytest.importorskip("hatchling")


def build(root: Path, version: str, target: Path) -> Path:
    """Build one wheel, `version` standard or editable, without a network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", f"wheel:{version}", "-d", str(target)],
        cwd=root,
        check=True,
        capture_output=True,
    )
    (wheel,) = target.glob("*.whl")
    return wheel


def run(code: str, path: Path) -> str:
    """Output of Python code with `path` first among the packages and no repository in sight."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env=os.environ | {"PYTHONPATH": str(path)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with an empty package, the project's own build files and nothing else."""
    root = tmp_path / "project"
    (root / "leankv_mlx").mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "LICENSE", "leankv_mlx/__init__.py"):
        shutil.copy(REPOSITORY / name, root / name)
    return root


def add(root: Path, name: str, text: str = "") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def contents(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_folders_that_are_absent_or_empty_are_left_out(project: Path, tmp_path: Path) -> None:
    (project / "metal").mkdir()
    assert contents(build(project, "standard", tmp_path / "out")) == {"leankv_mlx/__init__.py"}


def test_folders_outside_the_package_go_into_the_wheel(project: Path, tmp_path: Path) -> None:
    for name in ("models.toml", "metal/decode/attention.metal", "app/__init__.py"):
        add(project, name)
    add(project, HOOK)
    assert contents(build(project, "standard", tmp_path / "out")) == {
        "leankv_mlx/__init__.py",
        "leankv_mlx/models.toml",
        "leankv_mlx/metal/decode/attention.metal",
        "leankv_app/__init__.py",
        HOOK,
    }


@pytest.mark.parametrize("folder", [masks(), bases()], ids=lambda folder: folder.name)
def test_what_was_learned_and_ships_goes_into_the_wheel(
    folder: Path, project: Path, tmp_path: Path
) -> None:
    name = f"leankv_mlx/{folder.name}/demo.safetensors"
    add(project, name)
    assert folder.parent.name == "leankv_mlx"
    assert name in contents(build(project, "standard", tmp_path / "out"))


def test_the_hook_is_found_after_the_package_in_an_editable_install(
    project: Path, tmp_path: Path
) -> None:
    add(project, HOOK)
    # Python reads .pth files in this order, and the one of an editable install names the package.
    first, second = sorted(contents(build(project, "editable", tmp_path / "out")))
    assert first.endswith(".pth") and second == HOOK


def test_the_app_is_live_in_an_editable_install(project: Path, tmp_path: Path) -> None:
    add(project, "app/__init__.py")
    wheel = build(project, "editable", tmp_path / "out")
    site = tmp_path / "site"
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    add(project, "app/__init__.py", "name = 'app'")
    add(project, "app/screens/chat.py", "from leankv_app import name")
    code = "import leankv_app.screens.chat as chat; print(chat.name, chat.__file__)"
    assert run(code, site) == f"app {project / 'app/screens/chat.py'}"


def test_without_a_compiler_the_wheel_is_pure_and_says_why(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(project, "CMakeLists.txt")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    wheel = build(project, "standard", tmp_path / "out")
    assert wheel.name.endswith("-py3-none-any.whl")
    monkeypatch.setenv("LEANKV_NATIVE", "1")
    with pytest.raises(subprocess.CalledProcessError) as error:
        build(project, "standard", tmp_path / "out")
    assert b"there is no C++ compiler" in error.value.stdout + error.value.stderr


@pytest.mark.slow
def test_with_a_compiler_the_wheel_is_of_this_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlx", "nanobind"):
        pytest.importorskip(name)
    if not shutil.which("c++") or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C++ compiler")
    monkeypatch.setenv("LEANKV_NATIVE", "1")
    wheel = build(REPOSITORY, "standard", tmp_path / "out")
    assert "-none-any" not in wheel.name
    assert any(name.startswith("leankv_mlx/_native.") for name in contents(wheel))
    assert "leankv_mlx/libleankv_blas.so" in contents(wheel)


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(tmp_path: Path) -> None:
    wheel = build(REPOSITORY, "standard", tmp_path / "out")
    assert {"leankv_mlx/models.toml", "leankv_mlx/demo_model/model.safetensors"} <= contents(wheel)
    assert HOOK in contents(wheel)
    assert not {name.split("/")[0] for name in contents(wheel)} - {"leankv_mlx", "leankv_app", HOOK}
    site = tmp_path / "site"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = """
from importlib.metadata import distribution
from leankv_mlx import resources
print(*(p for p in (resources.models_toml(), resources.demo_model() / "config.json") if p.exists()))
(script,) = distribution("leankv-mlx").entry_points.select(name="leankv")
print(script.value)
"""
    data = f"{site / 'leankv_mlx/models.toml'} {site / 'leankv_mlx/demo_model/config.json'}"
    assert run(code, site) == f"{data}\nleankv_mlx.cli:main"
