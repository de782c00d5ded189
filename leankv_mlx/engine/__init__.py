"""One thread that loads a model and generates; requests go in, typed events come out.

Nothing here knows a user interface, and importing this package does not import mlx.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leankv_mlx.engine.catalogue import CatalogueEntry
    from leankv_mlx.engine.engine import Engine
    from leankv_mlx.engine.plan import Plan
    from leankv_mlx.engine.record import Recorder, ReplayEngine

_MODULES = {
    "CatalogueEntry": "catalogue",
    "Engine": "engine",
    "Plan": "plan",
    "Recorder": "record",
    "ReplayEngine": "record",
}

__all__ = [
    "CatalogueEntry",
    "Engine",
    "Plan",
    "Recorder",
    "ReplayEngine",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
