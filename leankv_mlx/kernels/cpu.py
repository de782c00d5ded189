"""The native CPU backend: MLX primitives from the extension `leankv_mlx._native` (see native/).

What runs as plain MLX ops instead: an array as mask, rounding=optimal, and rotations other than
Hadamard.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import mlx.core as mx  # before the extension, which links to its library

from leankv_mlx.codec.channels import reordered
from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import Hadamard, Ordered
from leankv_mlx.config import Rounding
from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.kernels.append import append_ops, each_append
from leankv_mlx.kernels.decode_attention import (
    between_rotations,
    decode_attention_ops,
    each_attend,
)
from leankv_mlx.kernels.encode import encode_ops
from leankv_mlx.kernels.gather import gather_ops
from leankv_mlx.kernels.prefill_attention import prefill_attention_ops
from leankv_mlx.kernels.types import (
    Attention,
    Backend,
    Centers,
    Mask,
    PrefillInputs,
    Rotations,
    Rows,
    Scales,
    Tier,
    View,
)

_MAX_DIM = 256
"""Channels that the kernels have room for (native/layout.h)."""


def make() -> Backend:
    """The backend.

    Raises:
        BackendUnavailableError: the extension is not there or does not fit, or MLX computes on
            another device.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        raise BackendUnavailableError("MLX computes on another device than the CPU.")
    load()
    return Backend(
        name="cpu",
        encode=_encode,
        dequantize=_dequantize,
        decode_attention=_decode_attention,
        prefill_attention=_prefill_attention,
        gather=_gather,
        append=_append,
        repack=_repack,
        decode_attention_batch=_decode_attention_batch,
        append_batch=_append_batch,
        widest=_MAX_DIM,
    )


@lru_cache(maxsize=1)
def load() -> Any:
    """The extension.

    Raises:
        BackendUnavailableError: it is not there, or was built for another MLX.
    """
    try:
        native = import_module("leankv_mlx._native")
    except ModuleNotFoundError:
        raise BackendUnavailableError(
            "the native extension was not built; install again where a C++ compiler is present."
        ) from None
    except (ImportError, ValueError) as error:  # ValueError: LEANKV_CPU_ISA
        raise BackendUnavailableError(f"the native extension does not load: {error}") from None
    built_for = ".".join(map(str, native.mlx_version))
    installed = version("mlx")
    if not re.match(re.escape(built_for) + r"(?!\d)", installed):
        raise BackendUnavailableError(
            f"the native extension was built for mlx {built_for}, but {installed} is installed; "
            "install again."
        )
    return native


@lru_cache(maxsize=64)
def _format(format: Format) -> Any:
    return load().Format(format.k_bits, format.v_bits)


@lru_cache(maxsize=1024)
def _rotation(rotation: Hadamard | Ordered) -> Any:
    """None if what follows the order is of a kind that the extension does not know."""
    order, turn = (
        (rotation.channels.forth, rotation.rotation)
        if isinstance(rotation, Ordered)
        else (None, rotation)
    )
    if not isinstance(turn, Hadamard):
        return None
    return load().Rotation(turn.signs, turn.block, turn.head_dim, order)


def _rotations(rotations: Rotations) -> tuple[Any, Any] | None:
    """None if the extension does not know one of them."""
    k, v = rotations
    if not isinstance(k, Hadamard | Ordered) or not isinstance(v, Hadamard):
        return None
    of_keys = _rotation(k)
    return None if of_keys is None else (of_keys, _rotation(v))


def _tier(tier: Tier) -> Any:
    return load().Body(tier.pool, tier.table, tier.lengths, _format(tier.format))


def _centers(centers: Centers | None) -> Any:
    return None if centers is None else load().Centers(centers.k, centers.v)


def _encode(
    rows: Rows, centers: Centers, format: Format, rounding: Rounding, shaping: mx.array | None
) -> mx.array:
    if rounding == "optimal":
        return encode_ops(rows, centers, format, rounding)
    blocks: mx.array = load().encode(*rows, _centers(centers), _format(format), rounding, shaping)
    return blocks


def _dequantize(body: Tier, centers: Centers, dtype: mx.Dtype) -> Rows:
    heads, dims = body.table.shape[0], (body.format.k_dim, body.format.v_dim)
    none = (mx.zeros((heads, 0, dim), dtype) for dim in dims)
    return Rows(*load().decode([_tier(body)], [(0, [])], *none, _centers(centers), 0, dtype, None))


def _gather(view: View, dtype: mx.Dtype) -> Rows:
    native = _rotations(view.rotations) if view.rotations else None
    if native is None and (view.rotations or not view.tiers):
        return gather_ops(view, dtype)
    places = [
        (start, [] if tier.heads is None else tier.heads.tolist())
        for start, tier in zip(view.starts, view.tiers, strict=True)
    ]
    k, v = load().decode(
        list(map(_tier, view.tiers)),
        places,
        *view.exact,
        _centers(view.centers),
        view.sinks,
        dtype,
        native,
    )
    if view.rotations and isinstance(view.rotations[0], Ordered):
        k = reordered(k, view.rotations[0].channels.back)  # it only un-rotates
    return Rows(k, v)


def _append(exact: Rows, new: Rows, rotations: Rotations) -> Rows:
    native = _rotations(rotations)
    if native is None:
        return append_ops(exact, new, rotations)
    return Rows(*load().append([exact.k], [exact.v], *new, [None], native))


def _append_batch(
    exact: Sequence[Rows], new: Rows, rotations: Rotations, scales: Scales
) -> list[Rows]:
    native = _rotations(rotations)
    if native is None:
        return each_append(append_ops, exact, new, rotations, scales)
    keys, values = zip(*exact, strict=True)
    out = load().append(keys, values, *new, scales, native)
    return list(map(Rows, out[: len(exact)], out[len(exact) :]))


def _repack(body: Tier, index: mx.array) -> mx.array:
    blocks: mx.array = load().repack(_tier(body), index)
    return blocks


def _decode_attention(
    queries: mx.array,
    view: View,
    *,
    scale: float,
    mask: Mask,
    sink_logits: mx.array | None,
) -> Attention:
    native = _rotations(view.rotations) if view.rotations else None
    plain = isinstance(mask, mx.array)
    if plain or (view.rotations and native is None):
        attend = decode_attention_ops if plain else partial(between_rotations, _decode_attention)
        return attend(queries, view, scale=scale, mask=mask, sink_logits=sink_logits)
    return _attend(queries, [view], scale, mask == "causal", sink_logits, [None], native)


def _decode_attention_batch(
    queries: mx.array,
    views: Sequence[View],
    *,
    scale: float,
    mask: str | None,
    sink_logits: mx.array | None,
    scales: Scales,
) -> Attention:
    rotations = views[0].rotations
    native = _rotations(rotations) if rotations else None
    if rotations and native is None:
        return each_attend(
            _decode_attention, queries, views, scales=scales, scale=scale, mask=mask,
            sink_logits=sink_logits,
        )  # fmt: skip
    return _attend(queries, views, scale, mask == "causal", sink_logits, scales, native)


def _attend(
    queries: mx.array,
    views: Sequence[View],
    scale: float,
    causal: bool,
    sink_logits: mx.array | None,
    scales: Scales,
    rotations: tuple[Any, Any] | None,
) -> Attention:
    """queries: of one view [Hq, L, D], or of several [B, Hq, L, D]."""
    native = load()
    sequences = [
        native.Sequence([_tier(x) for x in view.tiers], *view.exact, _centers(view.centers), own)
        for view, own in zip(views, scales, strict=True)
    ]
    skip = max([view.skip for view in views])  # 0 of those that have nothing to skip
    return Attention(
        *native.decode_attention(queries, sequences, scale, causal, sink_logits, rotations, skip)
    )


def _prefill_attention(inputs: PrefillInputs) -> mx.array:
    if isinstance(inputs.mask, mx.array):
        return prefill_attention_ops(inputs)
    native, queries = _rotations(inputs.rotations), inputs.queries
    if native is None:
        queries = inputs.rotations[0].apply(queries)
    out: mx.array = load().prefill_attention(
        queries,
        *inputs.rows,
        inputs.scale,
        inputs.mask == "causal",
        inputs.present,
        inputs.sink_logits,
        native,
    )
    # What follows in a lazy graph would be allocated while the rows are still held.
    mx.eval(out)
    return inputs.rotations[1].undo(out) if native is None else out
