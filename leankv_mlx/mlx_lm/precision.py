"""What a model computes in on the CPU: float32, where its weights have 16 bits.

MLX's products in half precision are slow on a CPU: a quantized one takes 20 to 65 times as long as
in float32, a dense one 5 to 50 times as long as OpenBLAS. So 16-bit parameters, the scales and
biases of quantized layers among them, become float32 when a model is loaded. Quantized layers that
`projections` multiplies stay quantized. The others become dense too if the model is small enough,
because MLX's quantized product runs in one thread and reads the weights again for every row.
Weights keep their values: replies are those of the same weights in float32.

On other devices, and with LEANKV_PRECISION=file, a model stays as its files have it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from leankv_mlx.mlx_lm.machine import memory_size, on_cpu
from leankv_mlx.projections import report, why_not_native

DENSE_BYTES = 8 * 2**30
"""Largest float32 model that quantized layers are made dense for; the machine must have four times
as much memory."""
_DENSE_SHARE = 4
_HALF = (mx.float16, mx.bfloat16)
_NOTE = "_leankv_weights_dtype"
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
"""Layers that have a dense counterpart; others, such as those of experts, stay quantized."""


def policy() -> str:
    """What happens to a model that is loaded now, in words."""
    if not on_cpu():
        return "as in the model's files"
    if _declined():
        return "as in the model's files (LEANKV_PRECISION=file)"
    unpacked = f"unpacked up to {_most_dense() / 1e9:.1f} GB"
    quantized = unpacked if why_not_native() else "multiplied by native products"
    return f"16-bit weights compute in float32, quantized ones {quantized}"


def compute_in_float32(
    model: nn.Module,
    lazy: bool = False,
    dense_bytes: int | None = None,
    half: mx.Dtype | None = None,
    projected: bool = False,
) -> None:
    """Let a model that was just loaded compute in float32, if MLX computes on the CPU.

    It is changed in place, a layer at a time, so that at most one layer is held in both forms.

    Args:
        lazy: leave the new parameters unevaluated, as mlx-lm's `load` does with `lazy=True`.
        dense_bytes: largest float32 model whose quantized layers become dense; by default
            `DENSE_BYTES` or a quarter of the memory, whichever is less.
        half: the 16-bit dtype of the weights, where the parameters need not say; by default that
            of most of them.
        projected: layers that `projections` knows stay quantized, and unevaluated, because they are
            relaid next.
    """
    if not on_cpu() or _declined():
        return
    half = half or _half_dtype(model)
    kept = {row.name for row in report(model) if not row.reason} if projected else set()
    if float32_bytes(model, kept) <= (_most_dense() if dense_bytes is None else dense_bytes):
        _unpack(model, kept, lazy)
    if half is None:
        return
    for name, module in model.named_modules()[::-1]:  # from the leaves up
        module.set_dtype(mx.float32, _is_half)
        if not lazy and name not in kept:
            mx.eval([array for array in module.values() if isinstance(array, mx.array)])
    # A plain attribute: no parameter, and gone with the model.
    object.__setattr__(model, _NOTE, str(half).rpartition(".")[2])  # a Dtype cannot be copied


def weights_dtype(model: nn.Module) -> mx.Dtype | None:
    """The 16-bit dtype that the weights had before `compute_in_float32`; None if they are as they
    were."""
    name = getattr(model, _NOTE, None)
    return None if name is None else getattr(mx, name)


def float32_bytes(model: nn.Module, kept: Container[str] = ()) -> int:
    """Bytes of the parameters as dense float32; layers that stay quantized count as they are.

    Args:
        kept: paths of layers that stay so.
    """
    total = sum(_as_float32(array) for _, array in _flat(model.parameters()))
    for name, module in model.named_modules():
        if type(module) in _QUANTIZED and name not in kept:
            packed = (module.get(key) for key in ("weight", "scales", "biases"))
            total -= sum(_as_float32(array) for array in packed if array is not None)
            total += 4 * module["weight"].size * 32 // module.bits
    return total


def _declined() -> bool:
    return os.environ.get("LEANKV_PRECISION", "").lower() == "file"


def _most_dense() -> int:
    return min(DENSE_BYTES, memory_size() // _DENSE_SHARE)


def _unpack(model: nn.Module, kept: Container[str], lazy: bool) -> None:
    """Put a dense layer in the place of each quantized one that is not kept; one that stands in
    several places is one layer afterwards, too."""
    made: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) not in _QUANTIZED or name in kept:
            continue
        dense = made.get(id(module))
        if dense is None:
            dense = made[id(module)] = _dense(module)
        if not lazy:
            mx.eval(dense.parameters())
        model.update_modules(tree_unflatten([(name, dense)]))


def _dense(module: Any) -> nn.Module:
    scales, biases = module["scales"], module.get("biases")
    if module.mode == "affine":  # other modes have no float scales
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(
        module["weight"],
        scales,
        biases,
        module.group_size,
        module.bits,
        module.mode,
        dtype=mx.float32,
    )
    made: nn.Module
    if type(module) is nn.QuantizedEmbedding:
        made = nn.Embedding(1, 1)
    else:
        made = nn.Linear(1, 1, bias="bias" in module)
    made["weight"] = weight
    if "bias" in module:
        made["bias"] = module["bias"]
    made.freeze()
    return made


def _half_dtype(model: nn.Module) -> mx.Dtype | None:
    """The 16-bit dtype that most of the parameters have; None if there is none."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, array in _flat(model.parameters()):
        if _is_half(array.dtype):
            sizes[array.dtype] += array.size
    return sizes.most_common(1)[0][0] if sizes else None


def _is_half(dtype: mx.Dtype) -> bool:
    return dtype in _HALF


def _as_float32(array: mx.array) -> int:
    return int(array.size) * (4 if _is_half(array.dtype) else int(array.dtype.size))


def _flat(tree: Any) -> list[tuple[str, Any]]:
    found: Any = tree_flatten(tree)
    return list(found)
