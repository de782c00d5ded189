"""Kept slots into new blocks on a GPU."""

from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.codec.format import TILE
from leankv_mlx.kernels.gpu.launch import Kernel, Launcher, format_template
from leankv_mlx.kernels.types import Tier

SIMD_GROUPS = 8

REPACK = Kernel(
    "leankv_repack",
    ("layout.metal", "repack.metal"),
    ("pool", "table", "slots"),
    ("blocks",),
    ("KF", "VF", "KC", "VC", "NSG"),
    """
  const int rows = lkv_rows(KF, KC) + lkv_rows(VF, VC) + 1;
  for (int row = (int)simdgroup_index_in_threadgroup; row < rows; row += NSG) {
    lkv_repack_row<KF, VF, KC, VC>(
        pool, table, table_shape[1], slots, slots_shape[1], blocks,
        (int)threadgroup_position_in_grid.z, (int)threadgroup_position_in_grid.y,
        (int)threadgroups_per_grid.y, row, thread_index_in_simdgroup);
  }
""",
)


@dataclass(frozen=True)
class Repack:
    """The operation; see `kernels.repack.repack`."""

    launch: Launcher

    def __call__(self, body: Tier, slots: mx.array) -> mx.array:
        """One threadgroup for each new block."""
        heads, kept = slots.shape
        count, words = -(-kept // TILE), body.format.words
        if not count:
            return mx.zeros((heads, 0, words), mx.uint32)
        (blocks,) = self.launch(
            REPACK,
            [body.pool, body.table, slots],
            {**format_template(body.format), "NSG": SIMD_GROUPS},
            (32 * SIMD_GROUPS, count, heads),
            (32 * SIMD_GROUPS, 1, 1),
            [((heads, count, words), mx.uint32)],
        )
        return blocks
