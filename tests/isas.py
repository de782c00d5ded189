"""The instruction sets of the native extension, which every parity matrix runs through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import cpu


def isas() -> list[str]:
    """Those that run here, best first; none without the extension."""
    try:
        names: list[str] = cpu.load().isas()
    except BackendUnavailableError:
        return []
    return names


@contextmanager
def selected(name: str) -> Iterator[None]:
    """The extension computes with this one inside of the block."""
    previous = cpu.load().isa()
    cpu.load().select_isa(name)
    try:
        yield
    finally:
        cpu.load().select_isa(previous)
