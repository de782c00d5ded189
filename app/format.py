"""Numbers as people read them."""

from __future__ import annotations

from pathlib import PurePath


def megabytes(n: float) -> str:
    """Bytes in kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def model_name(model: str) -> str:
    """How to call what a model was asked for by: a hub id as it is, a path by its last part."""
    hub_id = model.count("/") == 1 and model[0] not in "/~."
    return model if hub_id else PurePath(model).name
