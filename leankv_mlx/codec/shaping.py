"""Where the errors of keys go: noise shaping, in an encoder whose decoder knows nothing of it.

An error e of a stored key costs e.Me, M being the second moment of the queries that will meet it.
Codes of the nearest levels make an e that is spread over all channels, and cost the mean of M's
eigenvalues. With M = A^T D A, A unit lower triangular and D diagonal,

    e.Me = sum over i of D_i (e_i + sum over j < i of A_ij e_j)^2,

and if channels are encoded in their order, channel i as x_i + sum A_ij e_j, the errors behind the
first ones make up for those in front: each term is the error of one code alone. What is left is the
mean of D, which after a rotation is nearly the geometric mean of the eigenvalues. So it costs less
the more the queries of a head differ in size. (The same is done to weights by GPTQ,
arXiv 2210.17323, section 3, and LDLQ, arXiv 2307.13304, section 3; here the metric is that of the
queries.)
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.codebook import level, nearest
from leankv_mlx.codec.format import TILE

FLOOR = 0.05
"""Share of its mean eigenvalue that a metric gets more of in every direction: no direction is so
cheap that errors would be moved there without bounds."""


def shaping(metric: NDArray[np.floating]) -> mx.array:
    """What an encoder needs to know of a metric.

    Args:
        metric: M of each KV head, symmetric and without negative eigenvalues, not 0,
            [H, Dk, Dk], of rotated keys.

    Returns:
        float32 [H, Dk, Dk]. In row i stands what an error of channel i adds to the channels behind
        it, A_ji in column j > i; on the diagonal D_i; 0 in front of it.
    """
    wide = metric.astype(np.float64)
    dim = wide.shape[-1]
    mean = np.trace(wide, axis1=-2, axis2=-1)[:, None, None] / dim
    wide = wide / mean + FLOOR * np.eye(dim)
    # Cholesky's factor begins with the first channel; here the last one stands alone.
    root = np.linalg.cholesky(wide[:, ::-1, ::-1])[:, ::-1, ::-1]  # M = root root^T, upper
    sizes = np.diagonal(root, axis1=-2, axis2=-1)
    adds = root / sizes[:, None]
    return mx.array((np.triu(adds, 1) + sizes[:, None] ** 2 * np.eye(dim)).astype(np.float32))


def shaped(x: mx.array, scales: mx.array, bits: tuple[int, ...], shaping: mx.array) -> mx.array:
    """Encode vectors, each with several scales.

    Args:
        x: float32 [H, .., Dk], 0 in groups that are not stored.
        scales: float32 [H, .., F].
        bits: of each channel group.
        shaping: see there.

    Returns:
        codes uint32 [H, .., F, Dk].
    """
    targets = mx.broadcast_to(x[..., None, :], (*scales.shape, x.shape[-1]))
    codes = []
    for i, width in enumerate(np.repeat(bits, TILE).tolist()):
        if not width:
            codes.append(mx.zeros(scales.shape, mx.uint32))
            continue
        code = nearest(mx.where(scales > 0, targets[..., i] / scales, 0.0), width)
        error = x[..., i, None] - scales * level(code, width)
        targets = targets + error[..., None] * _of_vectors(_behind(shaping)[:, i], targets.ndim)
        codes.append(code)
    return mx.stack(codes, axis=-1)


def cost(errors: mx.array, bits: tuple[int, ...], shaping: mx.array) -> mx.array:
    """What errors float32 [H, .., Dk] cost, float32 [H, ..]; 0 in groups that are not stored, whose
    channels are not counted."""
    stored = mx.array(np.repeat([float(width > 0) for width in bits], TILE))
    behind = _behind(shaping).reshape(
        shaping.shape[0], *[1] * (errors.ndim - 3), *shaping.shape[1:]
    )
    sizes = _of_vectors(mx.diagonal(shaping, axis1=1, axis2=2), errors.ndim)
    return (stored * sizes * mx.square(errors + errors @ behind)).sum(axis=-1)


def _behind(shaping: mx.array) -> mx.array:
    """What channels add to those behind them."""
    return mx.triu(shaping, 1)


def _of_vectors(rows: mx.array, ndim: int) -> mx.array:
    """[H, Dk] -> [H, 1, .., Dk], of so many axes."""
    return rows.reshape(rows.shape[0], *[1] * (ndim - 2), rows.shape[1])
