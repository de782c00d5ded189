"""Which implementations exist, and which of them run here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import mlx.core as mx

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.gpu.devices import DEVICES
from leankv_mlx.projections import gpu, native, reference
from leankv_mlx.projections.types import Backend

_MAKERS: dict[str, Callable[[], Backend]] = {
    **{name: partial(gpu.make, name) for name in DEVICES},
    "cpu": native.make,
    "reference": reference.make,
}
"""Best first. A maker raises BackendUnavailableError with the reason when it cannot run here."""


def resolve_backend(name: str = "auto") -> Backend:
    """The backend of a name; "auto" takes the best that runs here, a named one never falls back.

    Raises:
        BackendUnavailableError: the named backend is unknown or cannot run here.
    """
    if name == "auto":
        return _best(mx.default_device().type)
    if name not in _MAKERS:
        raise BackendUnavailableError(
            f"unknown backend '{name}'; use auto or one of {', '.join(_MAKERS)}."
        )
    return _MAKERS[name]()


@lru_cache(maxsize=2)
def _best(device: mx.DeviceType) -> Backend:
    """On a kind of device, which is MLX's own at the moment."""
    for make in _MAKERS.values():
        try:
            return make()
        except BackendUnavailableError:
            continue
    raise AssertionError("the reference runs everywhere")
