"""Inputs of kernels: random blocks, rows and shapes, and subsets of a matrix of shapes.

Any words are codes, so blocks are drawn as words: every backend reads identical codes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import hadamard
from leankv_mlx.codec.rotation import rotation as make_rotation
from leankv_mlx.config import RotationName
from leankv_mlx.kernels import (
    Attention,
    Backend,
    Centers,
    Mask,
    PrefillInputs,
    Rotations,
    Rows,
    Tier,
    View,
    available_backends,
    resolve_backend,
)
from tests.isas import isas, selected

MIXED = -1
"""Bits that differ by channel group, one group not stored."""

FACTORS: Mapping[str, Sequence[Any]] = {
    "k_bits": (2, 3, 4, 8, MIXED),
    "v_bits": (2, 3, 4, 8, MIXED),
    "dims": ((64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (64, 160)),
    "group": (1, 2, 3, 4, 5, 6, 7, 8),
    "new": (1, 2, 3, 4, 5, 6, 7, 8),
    "lengths": ("full", "ragged", "empty heads", "partial"),
    "tiers": (0, 1, 2, 3),
    "exact": (0, 1, 4, 31, 32, 68, 103),
    "sink_logits": (False, True),
    "mask": (None, "causal"),
    "dtype": (mx.float32, mx.float16, mx.bfloat16),
    "rotated": (False, True),
    "skip": (0.0, 0.1, 0.9),
}
PREFILL_FACTORS: Mapping[str, Sequence[Any]] = {
    "dims": FACTORS["dims"],
    "group": FACTORS["group"],
    "new": (9, 31, 64, 65, 128, 257),
    "earlier": (0, 1, 63, 64, 65, 500),
    "tokens": ("all", "ragged", "exact rows alone"),
    "sink_logits": (False, True),
    "mask": (None, "causal"),
    "dtype": FACTORS["dtype"],
    "rotation": ("hadamard", "none"),
}
TOLERANCE = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
"""In units of the largest value; the last two are a rounding of the output."""

FIXED_POINT = {mx.float16: 2e-4, mx.bfloat16: 2e-4}
"""The same where the output is not rounded but products may be of int16."""


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few rows in which every pair of values of two factors occurs, found greedily."""
    draw = random.Random(seed)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        a, i, b, j = min(missing, key=str)
        best: tuple[set[Any], dict[str, int]] = (set(), {})
        for _ in range(20):
            row = {name: draw.randrange(len(factors[name])) for name in names}
            row[a], row[b] = i, j
            covered = {
                (x, row[x], y, row[y]) for x, y in itertools.combinations(names, 2)
            } & missing
            if len(covered) > len(best[0]):
                best = covered, row
        missing -= best[0]
        rows.append({name: factors[name][at] for name, at in best[1].items()})
    return rows


def full(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All bits with all dims and groups; the other factors take their values in turn."""
    names = ("k_bits", "v_bits", "dims", "group")
    turns = {n: itertools.cycle(v) for n, v in factors.items() if n not in names}
    return [
        dict(zip(names, row, strict=True)) | {n: next(turn) for n, turn in turns.items()}
        for row in itertools.product(*(factors[n] for n in names))
    ]


def identify(row: Mapping[str, Any]) -> str:
    return "-".join(str(v).removeprefix("mlx.core.").replace(" ", "") for v in row.values())


@dataclass(frozen=True)
class Case:
    """What decode attention is asked; see `kernels.decode_attention` and `kernels.types.View`."""

    queries: mx.array
    tiers: Sequence[Tier]
    exact: Rows
    centers: Centers | None
    scale: float
    sinks: int
    mask: Mask
    sink_logits: mx.array | None
    rotations: Rotations | None
    skip: float = 0.0

    @property
    def view(self) -> View:
        return View(self.tiers, self.exact, self.centers, self.sinks, self.rotations, self.skip)

    def attend(self, attend: Callable[..., Attention], **more: Any) -> Attention:
        """By an operation of a backend, or by the public one with `backend`."""
        asked = {"scale": self.scale, "mask": self.mask, "sink_logits": self.sink_logits}
        return attend(self.queries, self.view, **asked, **more)


def case(
    *,
    k_bits: int,
    v_bits: int,
    dims: tuple[int, int],
    group: int,
    new: int,
    lengths: str,
    tiers: int,
    exact: int,
    sink_logits: bool,
    mask: str | None,
    dtype: mx.Dtype,
    rotated: bool,
    skip: float = 0.0,
    heads: int = 3,
    blocks: int = 4,
) -> Case:
    """Random arrays of these shapes; the same arguments always give the same."""
    draw = np.random.default_rng(abs(hash((k_bits, v_bits, dims, group, new, exact))) % 2**32)
    exact = max(exact, new if mask == "causal" else 0)
    if not tiers or lengths == "empty heads":
        exact = max(exact, 1)  # some token for every head
    rotations = (hadamard(dims[0] - 7), hadamard(dims[1])) if rotated else None
    head_dim = rotations[0].head_dim if rotations else dims[0]
    return Case(
        queries=normal(draw, (heads * group, new, head_dim)).astype(dtype),
        tiers=[
            body(draw, bits_of(k_bits, dims[0], t), bits_of(v_bits, dims[1], t), heads, blocks,
                 lengths)
            for t in range(tiers)
        ],
        exact=Rows(*(normal(draw, (heads, exact, dim)).astype(dtype) for dim in dims)),
        centers=Centers(*(normal(draw, (heads, dim)) for dim in dims)),
        scale=dims[0] ** -0.5,
        sinks=min(4, max(0, exact - new)),  # the new rows stand behind the body
        mask=mask,
        sink_logits=normal(draw, (heads * group,)).astype(dtype) if sink_logits else None,
        rotations=rotations,
        skip=skip,
    )  # fmt: skip


def prefill_case(
    *,
    dims: tuple[int, int],
    group: int,
    new: int,
    earlier: int,
    tokens: str,
    sink_logits: bool,
    mask: str | None,
    dtype: mx.Dtype,
    rotation: RotationName,
    heads: int = 2,
) -> PrefillInputs:
    """Random arrays of these shapes; what is no token is large. `tokens` is what heads have: "exact
    rows alone" is the first head's."""
    draw = np.random.default_rng(1000 * new + earlier)
    rotations = make_rotation(rotation, dims[0] - 7), make_rotation(rotation, dims[1])
    rows = Rows(*(normal(draw, (heads, earlier + new, dim)).astype(dtype) for dim in dims))
    present = None
    if tokens != "all":
        sinks, window = min(4, earlier), min(70, max(0, earlier - 4))
        slots = draw.integers(0, earlier - sinks - window + 1, heads)
        if tokens == "exact rows alone":
            slots[0] = 0
        at = np.arange(earlier + new)
        used = (at < sinks + slots[:, None]) | (at >= earlier - window)
        present = mx.array(used)
        rows = Rows(*(mx.where(present[..., None], x, 1e4).astype(dtype) for x in rows))
    return PrefillInputs(
        queries=normal(draw, (heads * group, new, dims[0] - 7)).astype(dtype),
        rows=rows,
        scale=dims[0] ** -0.5,
        mask=mask,
        present=present,
        sink_logits=normal(draw, (heads * group,)).astype(dtype) if sink_logits else None,
        rotations=rotations,
    )


def bits_of(bits: int, dim: int, tier: int) -> tuple[int, ...]:
    """Bits of each group of 32 channels; tiers differ."""
    choices = (2, 3, 4, 8)
    if bits == MIXED:
        return tuple((4, 0, 3, 8, 2)[(i + tier) % 5] for i in range(dim // 32))
    return (choices[(choices.index(bits) + tier) % 4],) * (dim // 32)


def body(
    draw: np.random.Generator,
    k_bits: tuple[int, ...],
    v_bits: tuple[int, ...],
    heads: int,
    blocks: int,
    lengths: str,
) -> Tier:
    """Random blocks in random order; the scales of slots that are not in use are NaN."""
    slots = np.full(heads, 32 * blocks)
    if lengths == "ragged":
        slots = 32 * draw.integers(1, blocks + 1, heads)
    elif lengths == "partial":
        slots = draw.integers(1, 32 * blocks, heads)
    elif lengths == "empty heads":
        slots = draw.integers(0, 32 * blocks, heads) * (np.arange(heads) % 2)
    return stored(draw, Format(k_bits, v_bits), slots, blocks)


def stored(draw: np.random.Generator, format: Format, slots: NDArray[Any], blocks: int) -> Tier:
    """The same with so many slots of each head in use."""
    heads = len(slots)
    words = draw.integers(0, 2**32, (heads * blocks + 2, format.words), np.uint32)
    table = draw.permutation(heads * blocks + 2)[: heads * blocks].reshape(heads, blocks)
    scales = draw.uniform(0.5, 1.5, (*words.shape[:1], 32, 2)).astype(np.float16)
    for head, used in enumerate(slots):
        unused = np.arange(32 * blocks).reshape(blocks, 32) >= used
        scales[table[head]] = np.where(unused[..., None], np.float16("nan"), scales[table[head]])
    words[:, -32:] = scales.view(np.uint32)[..., 0]
    return Tier(
        mx.array(words),
        mx.array(table.astype(np.int32)),
        mx.array(slots.astype(np.int32)),
        format,
        bool((slots == 32 * blocks).all()),
    )


def normal(draw: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    return mx.array(draw.standard_normal(shape, np.float32))


def error(a: mx.array, b: mx.array) -> float:
    """Largest difference in units of the largest value of b."""
    x, y = (np.array(z.astype(mx.float32)) for z in (a, b))
    assert x.shape == y.shape and a.dtype == b.dtype
    return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) if y.size else 0.0


def used(body: Tier) -> NDArray[Any]:
    """bool [H, M * 32]: slots in use."""
    mask: NDArray[Any] = np.arange(body.slots) < np.array(body.lengths)[:, None]
    return mask


# One row for every implementation beside the reference: name -> (names of its variants if it runs
# here, else none; a context in which the backend is that variant).


@contextmanager
def _isa(name: str) -> Iterator[Backend]:
    with selected(name):
        yield resolve_backend("cpu")


def _gpu(name: str) -> tuple[Callable[[], list[str]], Callable[[str], Any]]:
    def names() -> list[str]:
        return ["gpu"] if available_backends()[name] is None else []

    return names, lambda _: nullcontext(resolve_backend(name))


def _msl() -> list[str]:
    """The GPU kernels on the CPU, under the checker."""
    from tests.msl import compiler

    return ["check"] if compiler.compiler() else []


def _msl_check(_: str) -> Any:
    from leankv_mlx.kernels.gpu import make_backend
    from tests.msl.launcher import MixedLauncher

    return nullcontext(make_backend("msl-check", MixedLauncher()))


IMPLEMENTATIONS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Any]]] = {
    "metal": _gpu("metal"),
    "cuda": _gpu("cuda"),
    "cpu": (isas, _isa),
    "msl-check": (_msl, _msl_check),
}


def variants() -> list[tuple[str, str]]:
    """(implementation, variant) of everything that runs here."""
    return [(name, v) for name, (names, _) in IMPLEMENTATIONS.items() for v in names()]
