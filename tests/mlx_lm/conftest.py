"""Running mlx-lm's commands with the hook, in a process of their own and in this one."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from leankv_mlx.mlx_lm import hook
from tests.mlx_lm.commands import Here, everything, hooked_environment


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hooked_environment(tmp_path_factory.mktemp("hook"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """Runs a command in this process, hooked as at the start of one: exit code, stdout, stderr."""

    def run_here(command: str, *arguments: str) -> tuple[int, str, str]:
        module = import_module(f"mlx_lm.{command}")
        monkeypatch.setattr(sys, "orig_argv", ["python", f"/bin/mlx_lm.{command}", *arguments])
        monkeypatch.setattr(sys, "argv", [f"mlx_lm.{command}", *arguments])
        monkeypatch.delenv("LEANKV_NO_HOOK", raising=False)
        before = everything(module)
        try:
            hook.install()
            module.main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        finally:
            hook.uninstall()
        assert everything(module) == before
        return code, *capfd.readouterr()

    return run_here
