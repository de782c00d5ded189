"""Layers of which codes keep some key channels, as kernels see them (`codec.channels`).

A head that keeps n of its groups is in the tiers whose formats store the first n, one for each
level of bits, and has length 0 in all others. A head that keeps none has length 0 everywhere. Keys
are put in order and rotated group by group, values are rotated as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.format import Format, padded
from leankv_mlx.codec.rotation import hadamard, ordered
from leankv_mlx.kernels import Centers, Rotations, Rows, Tier
from tests.kernels import cases
from tests.kernels.cases import Case, normal

HEADS = 4
KEPT: Mapping[str, Sequence[float]] = {
    "other shares": (1.0, 0.0, 0.5, 0.01),
    "one group each": (0.01,) * HEADS,
    "all or none": (0.0, 1.0, 0.0, 1.0),
    "one head": (0.0, 0.0, 0.0, 0.5),
    "none": (0.0,) * HEADS,
}
"""By name: the share of its groups that each head keeps, rounded up."""

FACTORS: Mapping[str, Sequence[Any]] = {
    "kept": tuple(KEPT),
    "k_bits": (2, 3, 4, 8),
    "v_bits": (2, 3, 4, 8),
    "head_dims": ((64, 64), (128, 128), (80, 80), (96, 128), (256, 256)),
    "levels": (1, 2),
    "group": (1, 3, 4, 8),
    "new": (1, 2, 3, 5, 8),
    "lengths": ("full", "ragged"),
    "exact": (1, 31, 68, 103),
    "sink_logits": (False, True),
    "mask": (None, "causal"),
    "dtype": cases.FACTORS["dtype"],
    "rotated": (False, True),
    "skip": (0.0, 0.1, 0.9),
}

ONE: Mapping[str, Any] = {
    "k_bits": 8, "v_bits": 8, "head_dims": (64, 64), "levels": 1, "group": 2, "new": 2,
    "lengths": "ragged", "exact": 40, "sink_logits": False, "mask": "causal", "dtype": mx.float32,
    "rotated": True,
}  # fmt: skip
"""A row without `kept`."""


def groups(kept: str, head_dim: int) -> list[int]:
    """How many groups each head keeps."""
    return [int(np.ceil(share * (padded(head_dim) // 32))) for share in KEPT[kept]]


def tiers(
    draw: np.random.Generator,
    kept: Sequence[int],
    bits: tuple[int, int],
    dims: tuple[int, int],
    levels: int,
    lengths: str,
    blocks: int,
) -> list[Tier]:
    """Those of the heads that keep so many groups, the most first, and of each all levels; dims as
    stored."""
    found = []
    for n in sorted({*kept} - {0}, reverse=True):
        mine = np.array(kept) == n
        for level in range(levels):
            k_bits, v_bits = (cases.bits_of(b, 32, level)[0] for b in bits)
            dropped = dims[0] // 32 - n
            format = Format((k_bits,) * n + (0,) * dropped, (v_bits,) * (dims[1] // 32))
            slots = np.full(len(kept), 32 * blocks)
            if lengths == "ragged" or level:
                slots = draw.integers(1, 32 * blocks, len(kept))
            tier = cases.stored(draw, format, slots * mine, blocks)
            found.append(replace(tier, heads=np.flatnonzero(mine)))
    return found


def rotations(kept: Sequence[int], head_dims: tuple[int, int]) -> Rotations:
    """Those of heads that keep so many groups, of channels in any order; a model's are the same."""
    draw = np.random.default_rng(3)
    order = np.stack([draw.permutation(head_dims[0]) for _ in kept])
    channels = Channels.of(order, np.array(kept))
    return ordered("hadamard", channels), hadamard(head_dims[1])


def case(
    *,
    kept: str,
    k_bits: int,
    v_bits: int,
    head_dims: tuple[int, int],
    levels: int,
    group: int,
    new: int,
    lengths: str,
    exact: int,
    sink_logits: bool,
    mask: str | None,
    dtype: mx.Dtype,
    rotated: bool,
    skip: float = 0.0,
    blocks: int = 3,
) -> Case:
    """Random arrays of these shapes; the same arguments always give the same."""
    draw = np.random.default_rng(abs(hash((k_bits, v_bits, head_dims, group, new, exact))) % 2**32)
    dims = padded(head_dims[0]), padded(head_dims[1])
    exact = max(exact, new if mask == "causal" else 0)
    query_heads, of_heads = HEADS * group, groups(kept, head_dims[0])
    return Case(
        queries=normal(draw, (query_heads, new, head_dims[0] if rotated else dims[0])).astype(
            dtype
        ),
        tiers=tiers(draw, of_heads, (k_bits, v_bits), dims, levels, lengths, blocks),
        exact=Rows(*(normal(draw, (HEADS, exact, dim)).astype(dtype) for dim in dims)),
        centers=Centers(*(normal(draw, (HEADS, dim)) for dim in dims)),
        scale=dims[0] ** -0.5,
        sinks=min(4, max(0, exact - new)),
        mask=mask,
        sink_logits=normal(draw, (query_heads,)).astype(dtype) if sink_logits else None,
        rotations=rotations(of_heads, head_dims) if rotated else None,
        skip=skip,
    )
