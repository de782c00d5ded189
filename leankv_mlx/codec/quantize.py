"""From rotated, centered vectors to codes and one scale each, and back.

Three ways to find the scale, all with the same decoder:
- "rms": the root mean square of the vector.
- "search": the best of several factors of the rms, each refined by least squares. It has the
  lowest error of the three at 4 bits and costs encoding time only. The stored scale is then the one
  that leaves the product with the vector itself as it was: the least-squares scale shortens every
  vector by its error, and so all scores and outputs (TurboQuant, arXiv 2504.19874, on the bias of
  inner products).
- "optimal": coordinate descent over the codes (optimal rounding of the TurboQuant-style LeanKV).

With `shaping` (see there) the first two encode channel by channel, and the search keeps the factor
whose codes cost least with the scale that will be stored.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from leankv_mlx.codec.codebook import level, nearest
from leankv_mlx.codec.format import TILE, runs
from leankv_mlx.codec.shaping import cost, shaped
from leankv_mlx.config import Rounding

SEARCH_FACTORS = tuple(float(f) for f in np.linspace(0.8, 1.2, 11))
_LARGEST_SCALE = 65504.0  # of fp16
_DESCENT_PASSES = 2

Bits = tuple[int, ...]


def quantize(
    x: mx.array, bits: Bits, rounding: Rounding, shaping: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Encode vectors.

    Args:
        x: float32 [..., D], D = 32 * len(bits); [H, ..., D] with `shaping`.
        bits: bits of each channel group.
        rounding: how the scale is found; "optimal" has no use for `shaping`.
        shaping: what errors cost, see `codec.shaping`; None if all channels are alike.

    Returns:
        codes uint32 [..., D] (0 in groups that are not stored) and scales fp16 [...].
    """
    x = _stored(x, bits)
    if shaping is not None and rounding != "optimal":
        return _encode_shaped(x, bits, rounding, shaping)
    return _ENCODERS[rounding](x, bits)


def dequantize(codes: mx.array, scales: mx.array, bits: Bits) -> mx.array:
    """codes: uint32 [..., D], scales: fp16 [...] -> float32 [..., D]; 0 where nothing is stored."""
    return _levels(codes, bits) * scales.astype(mx.float32)[..., None]


def _rms_scale(x: mx.array, bits: Bits) -> mx.array:
    channels = TILE * sum(b > 0 for b in bits)
    return mx.sqrt((x * x).sum(-1) / channels)


def _encode_rms(x: mx.array, bits: Bits) -> tuple[mx.array, mx.array]:
    scales = _as_stored(_rms_scale(x, bits))
    return _codes(x, scales, bits), scales


def _encode_search(x: mx.array, bits: Bits) -> tuple[mx.array, mx.array]:
    """Scale search: the least-squares scale of the factor that leaves the smallest error."""
    rms = _rms_scale(x, bits)
    best_error = mx.full(rms.shape, mx.inf)
    best = rms
    for factor in SEARCH_FACTORS:
        values = _levels(_codes(x, factor * rms, bits), bits)
        dot, norm = _fit(x, values)
        scale = dot / mx.maximum(norm, 1e-30)
        # Not from dot and norm: at 8 bits the difference is lost in the rounding of x.x.
        error = mx.square(x - scale[..., None] * values).sum(-1)
        better = error < best_error
        best_error = mx.where(better, error, best_error)
        best = mx.where(better, scale, best)
    codes = _codes(x, _as_stored(best), bits)
    return codes, _as_stored(_keeping(x, _levels(codes, bits), best))


def _encode_optimal(x: mx.array, bits: Bits) -> tuple[mx.array, mx.array]:
    """Coordinate descent: keep each step to a neighbouring level that lowers the squared error.

    The error is that of the re-fitted scale, so a step is kept when it raises (x.l)^2 / l.l.
    """
    codes = _codes(x, _rms_scale(x, bits), bits)
    tops = mx.array(np.repeat([2**b - 1 if b else 0 for b in bits], TILE).astype(np.int32))
    columns = [codes[..., i].astype(mx.int32) for i in range(x.shape[-1])]
    dot, norm = _fit(x, _levels(codes, bits))
    for _ in range(_DESCENT_PASSES):
        for i, group in enumerate(np.repeat(np.array(bits), TILE).tolist()):
            if not group:
                continue
            xi, old = x[..., i], level(columns[i], group)
            gain = dot * dot / mx.maximum(norm, 1e-30)
            for step in (-1, 1):
                code = mx.clip(columns[i] + step, 0, tops[i])
                new = level(code, group)
                dot2, norm2 = dot + xi * (new - old), norm + new * new - old * old
                gain2 = dot2 * dot2 / mx.maximum(norm2, 1e-30)
                better = (gain2 > gain) & (dot2 > 0)
                columns[i] = mx.where(better, code, columns[i])
                old = mx.where(better, new, old)
                dot, norm = mx.where(better, dot2, dot), mx.where(better, norm2, norm)
                gain = mx.where(better, gain2, gain)
        mx.eval(columns, dot, norm)  # the graph of a pass has thousands of nodes
    scales = _as_stored(dot / mx.maximum(norm, 1e-30))
    return mx.stack(columns, axis=-1).astype(mx.uint32), scales


def _encode_shaped(
    x: mx.array, bits: Bits, rounding: Rounding, shaping: mx.array
) -> tuple[mx.array, mx.array]:
    rms = _rms_scale(x, bits)
    if rounding == "rms":
        scales = _as_stored(rms)
        codes = shaped(x, scales.astype(mx.float32)[..., None], bits, shaping)
        return codes[..., 0, :], scales
    factors = mx.array(SEARCH_FACTORS) * rms[..., None]
    codes = shaped(x, factors, bits, shaping)
    wide, values = x[..., None, :], _levels(codes, bits)
    scales = _keeping(wide, values, factors)
    costs = cost(wide - scales[..., None] * values, bits, shaping)
    best = mx.argmin(costs, axis=-1, keepdims=True)
    codes = mx.take_along_axis(codes, best[..., None], axis=-2)[..., 0, :]
    return codes, _as_stored(mx.take_along_axis(scales, best, axis=-1)[..., 0])


_ENCODERS: dict[str, Callable[[mx.array, Bits], tuple[mx.array, mx.array]]] = {
    "search": _encode_search,
    "rms": _encode_rms,
    "optimal": _encode_optimal,
}


def _as_stored(scale: mx.array) -> mx.array:
    return mx.clip(scale, 0.0, _LARGEST_SCALE).astype(mx.float16)


def _keeping(x: mx.array, values: mx.array, scale: mx.array) -> mx.array:
    """The scale of these values that keeps the product of each vector with itself; `scale` where
    none does."""
    dot, _ = _fit(x, values)
    return mx.where(dot > 0, (x * x).sum(-1) / dot, scale)


def _fit(x: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """x.l and l.l of each vector, of which x.l / l.l is the least-squares scale."""
    return (x * values).sum(-1), (values * values).sum(-1)


def _codes(x: mx.array, scales: mx.array, bits: Bits) -> mx.array:
    """Nearest codes [..., D]; a scale of 0 gives codes near the middle, which decode to 0."""
    scale = scales.astype(mx.float32)[..., None]
    unit = mx.where(scale > 0, x / scale, 0.0)
    return _by_group(unit, bits, nearest, mx.uint32)


def _levels(codes: mx.array, bits: Bits) -> mx.array:
    return _by_group(codes, bits, level, mx.float32)


def _stored(x: mx.array, bits: Bits) -> mx.array:
    """x with zeros in the groups that are not stored, so that they do not weigh in the scale."""
    return x if all(bits) else _by_group(x, bits, lambda part, _: part, mx.float32)


def _by_group(
    x: mx.array, bits: Bits, map_: Callable[[mx.array, int], mx.array], dtype: mx.Dtype
) -> mx.array:
    parts = []
    for b, first, groups in runs(bits):
        part = x[..., TILE * first : TILE * (first + groups)]
        parts.append(map_(part, b) if b else mx.zeros(part.shape, dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
