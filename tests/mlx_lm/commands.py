"""Running mlx-lm's own commands, literally, with the hook as an installation has it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_lm.models import llama

from leankv_mlx.resources import demo_model

ROOT = Path(__file__).parents[2]
PTH = ROOT / "leankv_mlx_hook.pth"
MODEL = str(demo_model())
SUMMARY = re.compile(
    r"leankv: (\d+) tokens, KV \d+\.\d\d MB \(fp16 \d+\.\d\d MB\), (\d+\.\d\d)x, backend (\w+)\n"
)
LONG = "tell me a story about a red fox. " * 40
ONE_ERROR = re.compile(r"leankv: error: [^\n]+\n")
Here = Callable[..., tuple[int, str, str]]
"""The fixture `here`."""


def hooked_environment(folder: Path, **extra: str) -> dict[str, str]:
    """An environment whose Python processes the .pth file, from a site folder of its own."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    shutil.copy(PTH, site)
    (folder / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})\n")
    path = os.pathsep.join([str(ROOT), str(folder)])
    return os.environ | {"PYTHONPATH": path} | extra


def script(name: str, folder: Path | None = None) -> str:
    """The path of an installed command; `folder` is that of another installation."""
    return str((folder or Path(sysconfig.get_path("scripts"))) / name)


def run(
    command: list[str], environment: dict[str, str], text: str = "", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The outcome of a command: "python", or one of mlx-lm's; see `script`."""
    program = sys.executable if folder is None and command[0] == "python" else None
    return subprocess.run(
        [program or script(command[0], folder), *command[1:]],
        env=environment, input=text, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@contextmanager
def server(
    command: list[str], environment: dict[str, str], log: str | Path = os.devnull
) -> Iterator[str]:
    """The address of a running `mlx_lm.server`; it and what it started are ended in any case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    full = [*command, "--host", "127.0.0.1", "--port", port]
    address = f"http://127.0.0.1:{port}"
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            full, env=environment, stdin=subprocess.PIPE, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            _wait(process, address)
            yield address
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError("the server did not start")


def summary_of(stderr: str) -> tuple[int, float, str]:
    """Tokens, ratio and backend of the line that ends stderr."""
    found = SUMMARY.search(stderr)
    assert found and stderr.endswith(found[0]), stderr
    return int(found[1]), float(found[2]), found[3]


def everything(module: ModuleType) -> list[Any]:
    """What the hook may replace for the time of a command."""
    return [
        dict(vars(module)), dict(vars(argparse.ArgumentParser)), sys.excepthook,
        list(sys.meta_path), llama.scaled_dot_product_attention,
    ]  # fmt: skip
