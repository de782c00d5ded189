"""Blocks -> rows on a GPU."""

from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.kernels.gather import gather_ops
from leankv_mlx.kernels.gpu.launch import Kernel, Launcher, format_template
from leankv_mlx.kernels.types import Centers, Rows, Tier, View

DEQUANTIZE = Kernel(
    "leankv_dequantize",
    ("layout.metal", "dequantize.metal"),
    ("pool", "table", "lengths", "mu_k", "mu_v"),
    ("keys", "values"),
    ("KF", "VF", "KC", "VC"),
    """
  lkv_dequantize<KF, VF, KC, VC>(
      pool, table, table_shape[1], lengths, mu_k, mu_v, keys, values,
      (int)threadgroup_position_in_grid.z, (int)threadgroup_position_in_grid.y,
      (int)simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
)


@dataclass(frozen=True)
class Dequantize:
    """The operation; see `kernels.dequantize.dequantize`."""

    launch: Launcher

    def __call__(self, body: Tier, centers: Centers, dtype: mx.Dtype) -> Rows:
        """One SIMD group for each channel group of a block."""
        heads, width = body.table.shape
        dims = body.format.k_dim, body.format.v_dim
        shapes = [(heads, width * 32, dim) for dim in dims]
        if not width:
            return Rows(*(mx.zeros(shape, dtype) for shape in shapes))
        threads = sum(dims)
        k, v = self.launch(
            DEQUANTIZE,
            [body.pool, body.table, body.lengths, *centers],
            format_template(body.format),
            (threads, width, heads),
            (threads, 1, 1),
            [(shape, dtype) for shape in shapes],
        )
        return Rows(k, v)

    def gather(self, view: View, dtype: mx.Dtype) -> Rows:
        """`kernels.gather.gather`: joining and un-rotating are MLX's own kernels."""
        return gather_ops(view, dtype, decode=self)
