"""New rows behind the exact ones, rotated on a GPU: one launch for keys and values."""

from dataclasses import dataclass

from leankv_mlx.codec.rotation import Hadamard
from leankv_mlx.kernels.append import append_ops
from leankv_mlx.kernels.gpu.launch import Kernel, Launcher, nothing
from leankv_mlx.kernels.types import Rotations, Rows

ROWS = 4
"""Rows of a threadgroup, one for each of its SIMD groups."""

APPEND = Kernel(
    "leankv_append",
    ("rotate.metal",),
    ("old_keys", "old_values", "new_keys", "new_values", "signs_k", "signs_v"),
    ("keys", "values"),
    ("KC", "VC", "BLOCK_K", "BLOCK_V", "OLD", "ROWS"),
    """
  const int old = OLD ? old_keys_shape[1] : 0, fresh = new_keys_shape[1];
  const int head = (int)threadgroup_position_in_grid.z;
  const int row = (int)(threadgroup_position_in_grid.y * ROWS + simdgroup_index_in_threadgroup);
  const uint lane = thread_index_in_simdgroup;
  if (row < old + fresh) {
    lkv_append_row<KC, BLOCK_K>(old_keys, new_keys, old, fresh, new_keys_shape[2], signs_k, keys,
                                head, row, lane);
    lkv_append_row<VC, BLOCK_V>(old_values, new_values, old, fresh, new_values_shape[2], signs_v,
                                values, head, row, lane);
  }
""",
)


@dataclass(frozen=True)
class Append:
    """The operation; see `kernels.append.append`."""

    launch: Launcher

    def __call__(self, exact: Rows, new: Rows, rotations: Rotations) -> Rows:
        """A rotation that is no Hadamard, or rows of another dtype, run as plain MLX ops."""
        k, v = rotations
        same = all(old.dtype == rows.dtype for old, rows in zip(exact, new, strict=True))
        if not (same and isinstance(k, Hadamard) and isinstance(v, Hadamard)):
            return append_ops(exact, new, rotations)
        heads, old, _ = exact.k.shape
        total = old + new.k.shape[1]
        keys, values = self.launch(
            APPEND,
            [*(x if x.size else nothing(x.dtype) for x in exact), *new, k.signs, v.signs],
            {
                "KC": k.dim // 32,
                "VC": v.dim // 32,
                "BLOCK_K": k.block,
                "BLOCK_V": v.block,
                "OLD": old > 0,
                "ROWS": ROWS,
            },
            (32, -(-total // ROWS) * ROWS, heads),
            (32, ROWS, 1),
            [
                ((heads, total, rotation.dim), rows.dtype)
                for rotation, rows in zip((k, v), new, strict=True)
            ],
        )
        return Rows(keys, values)
