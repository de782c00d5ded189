"""Rows -> blocks on a GPU."""

from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.config import Rounding
from leankv_mlx.kernels.encode import encode_ops
from leankv_mlx.kernels.gpu.launch import Kernel, Launcher, format_template
from leankv_mlx.kernels.types import Centers, Rows

SIMD_GROUPS = 8

ENCODE = Kernel(
    "leankv_encode",
    ("layout.metal", "encode.metal"),
    ("keys", "values", "mu_k", "mu_v", "shaping"),
    ("blocks",),
    ("KF", "VF", "KC", "VC", "SEARCH", "SHAPED", "NSG"),
    """
  TG_ARRAY(uchar, tg_keys, 32 * lkv_codes_stride(KC));
  TG_ARRAY(uchar, tg_values, 32 * lkv_codes_stride(VC));
  lkv_encode_block<KF, VF, KC, VC, SEARCH, SHAPED, NSG>(
      keys, values, keys_shape[1], mu_k, mu_v, shaping, blocks,
      (int)threadgroup_position_in_grid.z, (int)threadgroup_position_in_grid.y,
      (int)threadgroups_per_grid.y, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      tg_keys, tg_values);
""",
)


@dataclass(frozen=True)
class Encode:
    """The operation; see `kernels.encode.encode`."""

    launch: Launcher

    def __call__(
        self,
        rows: Rows,
        centers: Centers,
        format: Format,
        rounding: Rounding,
        shaping: mx.array | None = None,
    ) -> mx.array:
        """rounding=optimal, a sequential descent, runs as plain MLX ops."""
        heads, tokens, _ = rows.k.shape
        if rounding == "optimal" or not tokens:
            return encode_ops(rows, centers, format, rounding)
        count = -(-tokens // TILE)
        # Arrays of fewer than 8 elements come as `constant`, which is another type.
        costs = mx.zeros(8) if shaping is None else shaping
        how = {"SEARCH": rounding == "search", "SHAPED": shaping is not None, "NSG": SIMD_GROUPS}
        (blocks,) = self.launch(
            ENCODE,
            [*rows, *centers, costs],
            {**format_template(format), **how},
            (32 * SIMD_GROUPS, count, heads),
            (32 * SIMD_GROUPS, 1, 1),
            [((heads, count, format.words), mx.uint32)],
        )
        return blocks
