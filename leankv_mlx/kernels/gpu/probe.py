"""Do the kernels compile here, and compute what the reference computes?"""

import mlx.core as mx

from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import hadamard
from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.decode_attention import decode_attention_ops
from leankv_mlx.kernels.types import Backend, Centers, Rows, Tier, View

_TOLERANCE = 1e-3
"""Far above rounding, and far below what any mistake would cause."""


def check(backend: Backend) -> None:
    """Encode a few rows, attend to them and compare: the smallest use of the kernels that count.

    Raises:
        BackendUnavailableError: an error, or a wrong result.
    """
    try:
        difference = _difference(backend)
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).split("\n")), "")
        raise BackendUnavailableError(f"the kernels do not run on this device: {line}") from error
    if not difference < _TOLERANCE:  # NaN counts
        raise BackendUnavailableError(
            f"the kernels compute something else than the reference here (by {difference:.1e})."
        )


def _difference(backend: Backend) -> float:
    keys = mx.random.split(mx.random.key(0), 5)
    new, exact, queries = (
        Rows(*(mx.random.normal((2, n, 64), key=keys[i + j]) for j in range(2)))
        for i, n in ((0, 40), (1, 5), (3, 1))
    )
    format = Format((4, 4), (4, 3))
    centers = Centers(new.k.mean(1), new.v.mean(1))
    pool = backend.encode(new, centers, format, "search").reshape(4, format.words)
    table, lengths = mx.arange(4, dtype=mx.int32).reshape(2, 2), mx.array([40, 33], mx.int32)
    tier = Tier(pool, table, lengths, format, full=False)
    rotations = hadamard(64), hadamard(64)
    view = View([tier], exact, centers, 4, rotations)
    results = [
        attend(queries.k, view, scale=0.125, mask=None, sink_logits=None).out
        for attend in (backend.decode_attention, decode_attention_ops)
    ]
    return float(mx.abs(results[0] - results[1]).max())
