"""Do the kernels compile here, and compute what the reference computes?"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.codec.rotation import hadamard
from leankv_mlx.codec.shaping import shaping
from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.append import append, append_batch, append_ops
from leankv_mlx.kernels.decode_attention import (
    decode_attention,
    decode_attention_batch,
    decode_attention_ops,
)
from leankv_mlx.kernels.dequantize import dequantize_ops
from leankv_mlx.kernels.encode import encode_ops
from leankv_mlx.kernels.types import Backend, Centers, EncodeOp, Rows, Tier, View

_TOLERANCE = 1e-3
"""Far above rounding, and far below what any mistake would cause."""
_HEADS, _DIM, _BLOCKS = 2, 64, 2
_ROTATIONS = hadamard(_DIM), hadamard(_DIM)
_FORMAT = Format((4, 4), (4, 3))
_ASKED: Any = {"scale": 0.125, "mask": None, "sink_logits": None}
_SEQUENCES = ((40, 5), (64, 11), (33, 0))
"""Tokens of the body of the first head, and exact rows. The first two lie in one pool."""


def check(backend: Backend) -> None:
    """Encode a few rows, and a decode step of a few small sequences, each alone and all together:
    the smallest use of the kernels that count.

    Raises:
        BackendUnavailableError: an error, or a wrong result.
    """
    try:
        wrong = [x for x in _differences(backend) if not x < _TOLERANCE]  # NaN counts
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).split("\n")), "")
        raise BackendUnavailableError(f"the kernels do not run on this device: {line}") from error
    if wrong:
        raise BackendUnavailableError(
            f"the kernels compute something else than the reference here (by {wrong[0]:.1e})."
        )


def _differences(backend: Backend) -> Iterator[float]:
    """From the reference: of what codes lose, of appended rows, of attention."""
    bodies = [_drawn(i, _HEADS, _BLOCKS * TILE) for i in range(len(_SEQUENCES))]
    for how in (None, shaping(np.eye(_DIM)[None].repeat(_HEADS, 0) + 1)):
        yield abs(_loss(bodies[0], backend.encode, how) - _loss(bodies[0], encode_ops, how))

    views, new = _views(bodies, backend), _drawn(8, len(_SEQUENCES), _HEADS, 1)
    exact = [view.exact for view in views]
    each = [Rows(k, v) for k, v in zip(*new, strict=True)]
    wanted = [append_ops(*pair, _ROTATIONS) for pair in zip(exact, each, strict=True)]
    alone = [append(*pair, _ROTATIONS, backend) for pair in zip(exact, each, strict=True)]
    for found in (alone, append_batch(exact, new, _ROTATIONS, backend)):
        for ours, theirs in zip(found, wanted, strict=True):
            yield from (_largest(x - y) for x, y in zip(ours, theirs, strict=True))

    views = [replace(view, exact=rows) for view, rows in zip(views, wanted, strict=True)]
    queries = _drawn(9, len(_SEQUENCES), _HEADS, 1).k
    together = decode_attention_batch(queries, views, **_ASKED, backend=backend)
    for q, view, out in zip(queries, views, together.out, strict=True):
        reference = decode_attention_ops(q, view, **_ASKED).out
        yield _largest(decode_attention(q, view, **_ASKED, backend=backend).out - reference)
        yield _largest(out - reference)


def _views(bodies: Sequence[Rows], backend: Backend) -> list[View]:
    """Ragged sequences of these bodies, each with its exact rows."""
    pools = [_encoded(body, backend.encode) for body in bodies]
    pools[:2] = [mx.concatenate(pools[:2])] * 2
    table = mx.arange(_HEADS * _BLOCKS, dtype=mx.int32).reshape(_HEADS, _BLOCKS)
    tables = [table, table + table.size, table]
    views = []
    for i, (tokens, exact) in enumerate(_SEQUENCES):
        lengths = mx.array([tokens, tokens - 7], mx.int32)
        tier = Tier(pools[i], tables[i], lengths, _FORMAT, full=False)
        rows = _drawn(4 + i, _HEADS, exact)
        views.append(View([tier], rows, _centers(bodies[i]), min(4, exact), _ROTATIONS))
    return views


def _encoded(rows: Rows, encode: EncodeOp, how: mx.array | None = None) -> mx.array:
    """A pool, head by head."""
    return encode(rows, _centers(rows), _FORMAT, "search", how).flatten(0, 1)


def _loss(rows: Rows, encode: EncodeOp, how: mx.array | None) -> float:
    """Mean distance of rows from what their codes decode to. Single codes may differ where two are
    as good."""
    table = mx.arange(_HEADS * _BLOCKS, dtype=mx.int32).reshape(_HEADS, _BLOCKS)
    lengths = mx.full(_HEADS, _BLOCKS * TILE, mx.int32)
    tier = Tier(_encoded(rows, encode, how), table, lengths, _FORMAT, full=True)
    decoded = dequantize_ops(tier, _centers(rows), mx.float32)
    return float(sum(mx.abs(x - y).mean() for x, y in zip(rows, decoded, strict=True)))


def _centers(rows: Rows) -> Centers:
    return Centers(rows.k.mean(axis=1), rows.v.mean(axis=1))


def _drawn(seed: int, *shape: int) -> Rows:
    """Keys and values [*shape, 64]."""
    keys = mx.random.split(mx.random.key(seed))
    return Rows(*(mx.random.normal((*shape, _DIM), key=key) for key in keys))


def _largest(difference: mx.array) -> float:
    return float(mx.abs(difference).max())
