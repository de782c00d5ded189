"""`leankv doctor`: what is installed, what runs here, and which backend `auto` takes."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from leankv_mlx.cli.console import console
from leankv_mlx.terminal import say_json

PACKAGES = ("leankv-mlx", "mlx", "mlx-lm", "transformers", "huggingface_hub")


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show versions, devices and backends, and whether the demo model is there."""
    facts = examine()
    if as_json:
        say_json(facts)
    else:
        _show(facts)
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that `doctor` tells; `problems` is empty if generation can work."""
    problems: list[str] = []
    devices: dict[str, Any] = {}
    backends: dict[str, str | None] = {}
    blas: dict[str, Any] = {}
    auto = precision = None
    try:
        from leankv_mlx.kernels import available_backends, resolve_backend
        from leankv_mlx.mlx_lm.precision import policy

        blas, precision = _blas(), policy()
        devices = _devices()
        backends = available_backends()
        auto = resolve_backend("auto").name
    except ImportError as error:
        problems.append(f"mlx does not import ({error}); on Linux install the extra cpu or cuda13.")
    model = _demo_model()
    if not model["complete"]:
        problems.append(f"the demo model is not complete in {model['path']}; install again.")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "devices": devices,
        "backends": {
            name: {"available": reason is None, "reason": reason}
            for name, reason in backends.items()
        },
        "auto": auto,
        "blas": blas,
        "precision": precision,
        "demo_model": model,
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "leankv-mlx":
            from leankv_mlx import __version__

            return __version__
        return None


def _devices() -> dict[str, Any]:
    import mlx.core as mx

    default = mx.default_device()
    return {
        "default": "gpu" if default == mx.Device(mx.gpu) else "cpu",
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "info": {key: value for key, value in mx.device_info().items() if _plain(value)},
    }


def _blas() -> dict[str, Any]:
    """What computes float32 products on the CPU, and how fast it is just now."""
    from leankv_mlx.blas import bind, products

    found, before = bind(), products()
    gflops = _gflops()
    reason = found.reason
    if not reason and products() == before:
        reason = "MLX's products do not go through it"
    return {
        "name": found.name if not reason else "MLX's own",
        "threads": found.threads if not reason else None,
        "reason": reason or None,
        "gflops": round(gflops, 1),
    }


def _gflops() -> float:
    """Of a product in float32 through MLX, the best within a third of a second."""
    import mlx.core as mx

    m, k, n = 256, 512, 1024
    a, b = mx.random.normal((m, k)), mx.random.normal((n, k))
    mx.eval(a, b)
    best, end = float("inf"), time.perf_counter() + 1 / 3
    while (start := time.perf_counter()) < end:
        mx.eval(mx.matmul(a, b.T, stream=mx.cpu))
        best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best / 1e9


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _demo_model() -> dict[str, Any]:
    from leankv_mlx.resources import demo_model

    folder = demo_model()
    files = [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    found = [file for file in files if file.is_file()]
    return {
        "path": str(folder),
        "complete": found == files,
        "bytes": sum(file.stat().st_size for file in found),
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, found in facts["versions"].items():
        table.add_row(name, found or "not installed")
    table.add_row("system", facts["machine"]["system"])
    for name, value in facts["devices"].items():
        if name != "info":
            table.add_row(f"device: {name}", str(value))
    for name, state in facts["backends"].items():
        taken = " (auto takes it)" if name == facts["auto"] else ""
        text = "available" + taken if state["available"] else f"no: {state['reason']}"
        table.add_row(f"backend: {name}", text)
    if blas := facts["blas"]:
        text = f"{blas['name']}, " + (f"{blas['threads']} threads, " if blas["threads"] else "")
        why = f" ({blas['reason']})" if blas["reason"] else ""
        table.add_row("float32 on the CPU", f"{text}{blas['gflops']} GFLOP/s{why}")
        table.add_row("precision", facts["precision"])
    model = facts["demo_model"]
    size = f"{model['path']} ({model['bytes'] / 1e6:.1f} MB)"
    table.add_row("demo model", size if model["complete"] else "missing")
    out = console(soft_wrap=True)
    out.print(table)
    for problem in facts["problems"]:
        out.print(f"problem: {problem}", style="red", markup=False)
