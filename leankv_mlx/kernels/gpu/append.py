"""New rows behind the exact ones, rotated on a GPU: keys and values in one launch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from leankv_mlx.codec.rotation import Hadamard
from leankv_mlx.kernels.append import append_ops, scaled_keys
from leankv_mlx.kernels.gpu.launch import Kernel, Launcher, hadamards, in_order, nothing
from leankv_mlx.kernels.types import Rotations, Rows, Scales

ROWS = 4
"""Rows of a threadgroup, one for each of its SIMD groups."""

MAX_SEQUENCES = 4
"""Sequences of a launch: each needs 5 of the 31 buffers that Metal has room for, shape included."""


@lru_cache
def append_kernel(sequences: int) -> Kernel:
    """The kernel for so many sequences. A grid has them in x, their rows in y, their heads in z."""
    several = range(sequences)
    return Kernel(
        f"leankv_append_{sequences}",
        ("rotate.metal",),
        (
            *(f"old_{side}{i}" for i in several for side in ("keys", "values")),
            *("new_keys", "new_values", "signs_k", "signs_v"),
        ),
        tuple(f"{side}{i}" for i in several for side in ("keys", "values")),
        ("KC", "VC", "BLOCK_K", "BLOCK_V", "OLD", "ROWS"),
        """
  const int fresh = new_keys_shape[1], head = (int)threadgroup_position_in_grid.z;
  const int row = (int)(threadgroup_position_in_grid.y * ROWS + simdgroup_index_in_threadgroup);
  const uint lane = thread_index_in_simdgroup;
"""
        + "".join(map(_sequence_body, several)),
    )


def _sequence_body(i: int) -> str:
    """What a threadgroup of sequence i does. Bit i of OLD: it has exact rows."""
    return f"""  if ((int)threadgroup_position_in_grid.x == {i}) {{
    const int old = OLD & {1 << i} ? old_keys{i}_shape[1] : 0;
    const int first = {i} * (int)threadgroups_per_grid.z * fresh;
    if (row < old + fresh) {{
      lkv_append_row<KC, BLOCK_K>(old_keys{i}, new_keys + first * new_keys_shape[2], old, fresh,
                                  new_keys_shape[2], signs_k, keys{i}, head, row, lane);
      lkv_append_row<VC, BLOCK_V>(old_values{i}, new_values + first * new_values_shape[2], old,
                                  fresh, new_values_shape[2], signs_v, values{i}, head, row, lane);
    }}
  }}
"""


@dataclass(frozen=True)
class Append:
    """The operation; see `kernels.append.append`."""

    launch: Launcher

    def __call__(self, exact: Rows, new: Rows, rotations: Rotations) -> Rows:
        """A rotation that is no Hadamard, or rows of another dtype, run as plain MLX ops."""
        known = _known([exact], new, rotations)
        if not known:
            return append_ops(exact, new, rotations)
        return self._append([exact], Rows(in_order(new.k, rotations), new.v), known)[0]

    def batch(
        self, exact: Sequence[Rows], new: Rows, rotations: Rotations, scales: Scales
    ) -> list[Rows]:
        """The operation on a batch, a launch for each few of its sequences; see
        `kernels.append.append_batch`."""
        new = Rows(scaled_keys(new.k, scales), new.v)
        known = _known(exact, new, rotations)
        if not known:
            each = (Rows(*(x[i] for x in new)) for i in range(len(exact)))
            return [append_ops(*pair, rotations) for pair in zip(exact, each, strict=True)]
        new, found = Rows(in_order(new.k, rotations), new.v), []
        for first in range(0, len(exact), MAX_SEQUENCES):
            few = slice(first, first + MAX_SEQUENCES)
            found += self._append(exact[few], Rows(*(x[few].flatten(0, 1) for x in new)), known)
        return found

    def _append(
        self, exact: Sequence[Rows], new: Rows, rotations: tuple[Hadamard, Hadamard]
    ) -> list[Rows]:
        """One launch; new rows [B * H, T, head_dim] of B sequences."""
        heads, tokens = exact[0].k.shape[0], new.k.shape[1]
        k, v = rotations
        totals = [rows.k.shape[1] + tokens for rows in exact]
        found = self.launch(
            append_kernel(len(exact)),
            [
                *(x if x.size else nothing(x.dtype) for rows in exact for x in rows),
                *new,
                k.signs,
                v.signs,
            ],
            {
                "KC": k.dim // 32,
                "VC": v.dim // 32,
                "BLOCK_K": k.block,
                "BLOCK_V": v.block,
                "OLD": sum((total > tokens) << i for i, total in enumerate(totals)),
                "ROWS": ROWS,
            },
            (32 * len(exact), -(-max(totals) // ROWS) * ROWS, heads),
            (32, ROWS, 1),
            [
                ((heads, total, rotation.dim), rows.dtype)
                for total in totals
                for rotation, rows in zip((k, v), new, strict=True)
            ],
        )
        return [Rows(*pair) for pair in zip(found[::2], found[1::2], strict=True)]


def _known(
    exact: Sequence[Rows], new: Rows, rotations: Rotations
) -> tuple[Hadamard, Hadamard] | None:
    """The rotations, if the kernel knows them and all rows have one dtype a side."""
    same = all(old.dtype == rows.dtype for one in exact for old, rows in zip(one, new, strict=True))
    return hadamards(rotations) if same else None
