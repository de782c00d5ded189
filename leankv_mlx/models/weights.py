"""The tensors of a GGUF file as the weights of an mlx-lm model, some rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from leankv_mlx.models.architectures import Model, Target
from leankv_mlx.models.container import FlawError, Tensor
from leankv_mlx.models.quantized import (
    AFFINE,
    GROUP,
    bits_of,
    check_readable,
    dequantize,
    scales_of,
    triple,
)
from leankv_mlx.models.tensor_file import TensorFile

DType = Literal["float16", "bfloat16", "float32"]
_NAMES: dict[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_DENSE = ("F32", "F16", "BF16")
_SLAB = 1 << 20  # elements that are converted at a time

Array = np.ndarray[Any, Any]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Parameter -> (dtype, shape)."""
Look = Callable[[], None]
"""Called while something takes long; may raise to stop it."""


def go_on() -> None:
    """A `Look` that stops nothing."""


def layout(model: Model, tensors: Mapping[str, Tensor], dtype: DType | None) -> Layout:
    """What the weights file will hold.

    Args:
        dtype: of everything but the levels; None for what holds the file's numbers exactly.

    Raises:
        FlawError: a tensor has a type that cannot be read.
    """
    made: Layout = {}
    for name, to in model.targets.items():
        tensor = tensors[name]
        if tensor.kind in _DENSE:
            kept = "F32" if to.change == "minus one" else tensor.kind
            made[to.name] = (_NAMES[dtype] if dtype else kept, tensor.shape)
            continue
        if len(tensor.shape) == 1:
            raise FlawError(f"the tensor {name} is of type {tensor.kind}, and is no matrix")
        check_readable(tensor.kind)
        rows, columns = tensor.shape
        scales = (_NAMES[dtype] if dtype else scales_of(tensor.kind), (rows, columns // GROUP))
        path = to.name.removesuffix("weight")
        made[to.name] = ("U32", (rows, columns * bits_of(tensor.kind) // 32))
        made[f"{path}scales"] = made[f"{path}biases"] = scales
    return made


def quantization(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The entry of config.json: the bits that most layers have, and the layers with others."""
    bits = {
        to.name.removesuffix(".weight"): bits_of(tensors[name].kind)
        for name, to in model.targets.items()
        if tensors[name].kind not in _DENSE
    }
    if not bits:
        return None
    usual = Counter(bits.values()).most_common(1)[0][0]
    others = {
        path: {"group_size": GROUP, "bits": own} for path, own in bits.items() if own != usual
    }
    return {"group_size": GROUP, "bits": usual, "mode": "affine", **others}


def quantized_again(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Types that do not map exactly -> how many tensors have them."""
    kinds = (tensors[name].kind for name in model.targets)
    return dict(sorted(Counter(k for k in kinds if k not in AFFINE and k not in _DENSE).items()))


def write_weights(
    file: BinaryIO,
    path: Path,
    model: Model,
    tensors: Mapping[str, Tensor],
    dtype: DType | None,
    look: Look = go_on,
) -> None:
    """Convert all tensors into a new safetensors file.

    Args:
        look: called for every piece; may raise to stop.

    Raises:
        FlawError: there are weights that are no numbers, or do not fit the dtype.
        OSError: a file cannot be read or written.
    """
    made = layout(model, tensors, dtype)
    with TensorFile(path, made) as out:
        for name, to in model.targets.items():
            for row, rows in _slabs(file, tensors[name], to, model.head_dim):
                look()
                for part, values in _converted(rows, tensors[name], to):
                    out.write(part, row, _stored(values, made[part][0]))


def read_dense(file: BinaryIO, tensor: Tensor) -> Array:
    """A small tensor, [rows,] columns, as float32.

    Raises:
        FlawError: it has a quantized type, or the file became shorter.
    """
    if tensor.kind not in _DENSE:
        raise FlawError(f"the tensor {tensor.name} is of type {tensor.kind}")
    raw = _read(file, tensor.offset, tensor.nbytes)
    return dequantize(raw.reshape(1, -1), tensor.kind).reshape(tensor.shape)


def _read(file: BinaryIO, offset: int, nbytes: int) -> Array:
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise FlawError("it became shorter while it was read")
    return np.frombuffer(data, np.uint8)


def _slabs(
    file: BinaryIO, tensor: Tensor, to: Target, head_dim: int
) -> Iterator[tuple[int, Array]]:
    """The first row and the bytes [rows, bytes] of each piece; a vector is one row."""
    count = tensor.shape[0] if len(tensor.shape) > 1 else 1
    step = max(_SLAB // tensor.shape[-1], 1)
    if to.change == "unpermute":
        step = max(step // head_dim, 1) * head_dim  # whole heads
    for row in range(0, count, step):
        rows = min(step, count - row)
        raw = _read(file, tensor.offset + row * tensor.row_bytes, rows * tensor.row_bytes)
        slab = raw.reshape(rows, -1)
        yield row, _unpermuted(slab, head_dim) if to.change == "unpermute" else slab


def _unpermuted(rows: Array, head_dim: int) -> Array:
    """Each head's rows from pairs (0, d/2, 1, d/2 + 1, ...) back to halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _converted(rows: Array, tensor: Tensor, to: Target) -> Iterator[tuple[str, Array]]:
    """Parameter -> its values; float32 for bfloat16."""
    if tensor.kind not in _DENSE:
        path = to.name.removesuffix("weight")
        found = triple(rows, tensor.kind)
        yield from ((f"{path}{part}", getattr(found, part)) for part in found._fields)
        return
    values = rows.view("<f2") if tensor.kind == "F16" else dequantize(rows, tensor.kind)
    if not np.isfinite(values).all():
        raise FlawError("it has weights that are no numbers")
    yield to.name, values.astype("<f4") - 1 if to.change == "minus one" else values


def _stored(values: Array, dtype: str) -> Array:
    """Values in the dtype of the weights file, bfloat16 as its bits.

    Raises:
        FlawError: they are too large for it.
    """
    if dtype == "U32":
        return values
    if dtype == "BF16":
        bits: Array = values.astype("<f4").view("<u4")
        rounded: Array = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        return rounded.astype("<u2")
    with np.errstate(over="ignore"):
        stored: Array = values.astype("<f2" if dtype == "F16" else "<f4", copy=False)
    if not np.isfinite(stored).all():
        raise FlawError("its weights are too large for float16")
    return stored
