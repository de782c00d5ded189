"""Which implementations exist, and which of them run here."""

from collections.abc import Callable
from functools import partial

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels import cpu
from leankv_mlx.kernels.append import append_ops
from leankv_mlx.kernels.decode_attention import decode_attention_ops
from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.encode import encode_ops
from leankv_mlx.kernels.gather import gather_ops
from leankv_mlx.kernels.gpu import devices
from leankv_mlx.kernels.prefill_attention import prefill_attention_ops
from leankv_mlx.kernels.repack import repack_ops
from leankv_mlx.kernels.types import Backend


def _reference() -> Backend:
    return Backend(
        name="reference",
        encode=encode_ops,
        dequantize=dequantize_ops,
        decode_attention=decode_attention_ops,
        prefill_attention=prefill_attention_ops,
        gather=gather_ops,
        append=append_ops,
        repack=repack_ops,
        codecs=(),
    )


_MAKERS: dict[str, Callable[[], Backend]] = {
    **{name: partial(devices.make, name) for name in devices.DEVICES},
    "cpu": cpu.make,
    "reference": _reference,
}
"""Best first. A maker raises BackendUnavailableError with the reason when it cannot run here."""


def available_backends() -> dict[str, str | None]:
    """Every backend, best first: None if it runs here, else the reason why not."""
    reasons: dict[str, str | None] = {}
    for name, make in _MAKERS.items():
        try:
            make()
            reasons[name] = None
        except BackendUnavailableError as error:
            reasons[name] = str(error)
    return reasons


def resolve_backend(name: str = "auto") -> Backend:
    """The backend of a name; "auto" takes the best that runs here, a named one never falls back.

    Raises:
        BackendUnavailableError: the named backend is unknown or cannot run here.
    """
    if name == "auto":
        name = next(n for n, reason in available_backends().items() if reason is None)
    if name not in _MAKERS:
        raise BackendUnavailableError(
            f"unknown backend '{name}'; use auto or one of {', '.join(_MAKERS)}."
        )
    return _MAKERS[name]()
