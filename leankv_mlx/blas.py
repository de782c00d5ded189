"""A fast BLAS under MLX's float32 products on Linux CPUs.

MLX's Linux wheel brings the reference BLAS. `bind` loads OpenBLAS from the package
scipy-openblas32, whose symbols carry a prefix, and makes `libleankv_blas.so` (native/blas/) global,
which has the plain names and forwards them. The dynamic loader resolves the products of libmlx.so
when mlx.core is imported, and finds those names first.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = "scipy_openblas32"
_FORWARDER = Path(__file__).with_name("libleankv_blas.so")
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Blas:
    """What `bind` came to.

    Attributes:
        name: library and version that compute MLX's float32 products; "" if it is MLX's own BLAS.
        threads: of that library, 0 without one.
        reason: why MLX's own BLAS stays; "" if it does not.
    """

    name: str = ""
    threads: int = 0
    reason: str = ""


_bound: Blas | None = None


def bind() -> Blas:
    """Put OpenBLAS in place of MLX's reference BLAS, for this process and for good.

    To be called before mlx.core is imported; the commands of this package do so. Where it cannot be
    done everything works as before, and `Blas.reason` says why. LEANKV_BLAS=off declines it, and
    OpenBLAS itself reads OPENBLAS_NUM_THREADS. Calling it again changes nothing.
    """
    global _bound
    with _LOCK:
        if _bound is None:
            reason = _obstacle()
            if reason:
                return Blas(reason=reason)
            try:
                _bound = _load(_openblas())
            except (OSError, AttributeError) as error:
                return Blas(reason=" ".join(str(error).split()))
        return _bound


def products() -> int:
    """How many products have gone through what `bind` loaded: whether it is in use."""
    return int(_forwarder().leankv_blas_products()) if _bound else 0


def _obstacle() -> str:
    """Why nothing is tried; "" if it is."""
    if os.environ.get("LEANKV_BLAS", "").lower() == "off":
        return "LEANKV_BLAS=off"
    if not sys.platform.startswith("linux"):
        return "MLX uses the system's BLAS here"
    if "mlx.core" in sys.modules:
        return "mlx was imported before"
    if not _FORWARDER.is_file():
        return "it was not built; install again where a C++ compiler is present"
    if find_spec(_PACKAGE) is None:
        return "scipy-openblas32 is not installed; it comes with the extra cpu"
    return ""


def _openblas() -> Path:
    """The library in the package, found without running the package's code.

    Raises:
        OSError: it is not there.
    """
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*.so")):
            return path
    raise OSError("scipy-openblas32 holds no library")


def _load(path: Path) -> Blas:
    """Make OpenBLAS's products global.

    Raises:
        OSError, AttributeError: a library does not load, or lacks a function.
    """
    openblas = ctypes.CDLL(str(path))
    openblas.scipy_openblas_get_config.restype = ctypes.c_char_p
    words = openblas.scipy_openblas_get_config().decode().split()
    if not _forwarder().leankv_blas_open(os.fsencode(path)):
        raise OSError(f"{path.name} lacks functions that MLX needs")
    ctypes.CDLL(str(_FORWARDER), ctypes.RTLD_GLOBAL)  # not before it can forward
    return Blas(" ".join(words[:2]), int(openblas.scipy_openblas_get_num_threads()))


@cache
def _forwarder() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_FORWARDER))
    library.leankv_blas_products.restype = ctypes.c_int64
    return library
