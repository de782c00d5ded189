"""Decode attention on a GPU: one launch for each tier, one merge, no synchronization."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2

import mlx.core as mx

from leankv_mlx.codec.rotation import Hadamard
from leankv_mlx.kernels.decode_attention import between_rotations, decode_attention_ops
from leankv_mlx.kernels.gpu.geometry import Shape
from leankv_mlx.kernels.gpu.launch import (
    Kernel,
    Launcher,
    Output,
    Template,
    constant,
    fits,
    format_template,
    nothing,
)
from leankv_mlx.kernels.types import Attention, Body, DecodeInputs, Rows

MAX_ROWS = 8
"""Query rows of a KV head that one threadgroup takes: they live in registers."""
_LOG2_E = log2(2.718281828459045)

_INPUTS = (
    "queries", "signs", "scale", "pool", "table", "lengths", "mu_k", "mu_v", "keys", "values",
)  # fmt: skip
_TEMPLATE = (
    "KF", "VF", "KC", "VC", "BLOCK", "S", "R", "T", "NSG", "BODY", "EXACT", "CAUSAL",
)  # fmt: skip
_BODY = """
  TG_ARRAY(float, tg_queries, KC * 32 * R);
  TG_ARRAY(float, tg_biases, R);
  TG_ARRAY(float, tg_probabilities, NSG * 32 * R);
  TG_ARRAY(float, tg_table, S == LKV_TABLE ? LKV_TABLE_SIZE : 1);
  TG_ARRAY(float, tg_outs, NSG * VC * 32);
  TG_ARRAY(float, tg_mosts, NSG);
  TG_ARRAY(float, tg_sums, NSG);
  TG_ARRAY(float, tg_least, R);
  lkv_shared shared;
  shared.queries = tg_queries;
  shared.biases = tg_biases;
  shared.probabilities = tg_probabilities;
  shared.table = tg_table;
  shared.outs = tg_outs;
  shared.mosts = tg_mosts;
  shared.sums = tg_sums;
  shared.least = tg_least;
  const int tokens = queries_shape[1];
  const int query_rows = queries_shape[0] / (int)threadgroups_per_grid.y * tokens;
  const lkv_reads count =
      lkv_decode_attention<KF, VF, KC, VC, BLOCK, S, R, T, NSG, BODY, EXACT, {skip}>(
          queries, query_rows, tokens, queries_shape[2], signs, scale[0], pool, table,
          table_shape[1], lengths, mu_k, mu_v, keys, values, keys_shape[1], CAUSAL, {log_skip},
          part, threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
          threadgroup_position_in_grid.z, threadgroups_per_grid.z, thread_index_in_simdgroup,
          simdgroup_index_in_threadgroup, shared);
"""

SPLITS = Kernel(
    "leankv_decode_attention",
    ("layout.metal", "values.metal", "rotate.metal", "decode_attention.metal"),
    _INPUTS,
    ("part",),
    _TEMPLATE,
    _BODY.format(skip="false", log_skip="0.0f") + "  (void)count;\n",
)
SKIPPING = replace(
    SPLITS,
    name="leankv_decode_attention_skip",
    inputs=(*_INPUTS, "log_skip"),
    outputs=("part", "reads"),
    body=_BODY.format(skip="true", log_skip="log_skip[0]")
    + """  if (thread_index_in_simdgroup == 0) {
    const int group = (int)((threadgroup_position_in_grid.y * threadgroups_per_grid.x +
                             threadgroup_position_in_grid.x) * threadgroups_per_grid.z +
                            threadgroup_position_in_grid.z) * NSG +
                      (int)simdgroup_index_in_threadgroup;
    reads[2 * group] = count.read;
    reads[2 * group + 1] = count.all;
  }
""",
)
"""The same with `skip`; every SIMD group also leaves what it read, `Attention.reads`."""


@lru_cache
def merge_kernel(parts: int) -> Kernel:
    """The kernel that merges the splits of so many launches."""
    names = tuple(f"part{i}" for i in range(parts))
    merges = "".join(
        f"  lkv_merge_part<VC>({name}, {name}_shape[1], row, lane, merged);\n" for name in names
    )
    return Kernel(
        f"leankv_merge_splits_{parts}",
        ("rotate.metal", "merge_splits.metal"),
        (*names, "sink_logits", "signs"),
        ("out", "lse"),
        ("VC", "BLOCK", "TOKENS", "HEAD_DIM", "SINK"),
        f"""
  const int row = (int)threadgroup_position_in_grid.y;
  const uint lane = thread_index_in_simdgroup;
  lkv_merged<VC> merged;
  lkv_merge_start<VC>(merged);
{merges}  if (SINK) lkv_merge_logit<VC>((float)sink_logits[row / TOKENS], merged);
  lkv_merge_store<VC, BLOCK>(merged, signs, HEAD_DIM, row, lane, out, lse);
""",
    )


def shape_of(queries: mx.array, body: Body | None, exact: Rows, with_rows: bool) -> Shape:
    """What the launch of a tier depends on."""
    heads = exact.k.shape[0]
    slots = (body.slots if body else 0) + (exact.k.shape[1] if with_rows else 0)
    dim = max(exact.k.shape[2], exact.v.shape[2])
    return Shape(heads * _tiles(queries, heads), dim, slots)


def _query_rows(queries: mx.array, heads: int) -> int:
    return int(queries.shape[0]) // heads * int(queries.shape[1])


def _tiles(queries: mx.array, heads: int) -> int:
    """Threadgroups that share the query rows of a KV head."""
    return -(-_query_rows(queries, heads) // MAX_ROWS)


Hadamards = tuple[Hadamard, Hadamard] | None
"""Rotations that the kernels apply themselves; None where queries and output are rotated."""


@dataclass(frozen=True)
class DecodeAttention:
    """The operation; see `kernels.decode_attention.decode_attention`."""

    launch: Launcher

    def __call__(self, inputs: DecodeInputs) -> Attention:
        """An array as mask runs as plain MLX ops, and so does a rotation that is no Hadamard."""
        exact = inputs.exact
        if isinstance(inputs.mask, mx.array) or not fits(exact.k.shape[2], exact.v.shape[2]):
            return decode_attention_ops(inputs)
        if inputs.rotations is None:
            return self._attend(inputs, None)
        k, v = inputs.rotations
        if isinstance(k, Hadamard) and isinstance(v, Hadamard):
            return self._attend(inputs, (k, v))
        return between_rotations(lambda rotated: self._attend(rotated, None), inputs)

    def _attend(self, inputs: DecodeInputs, rotations: Hadamards) -> Attention:
        """The exact rows go with the first tier."""
        bodies, has_rows = inputs.bodies, inputs.exact.k.shape[1] > 0
        splits = [self._split(inputs, rotations, bodies[0] if bodies else None, has_rows)]
        splits += [self._split(inputs, rotations, body, False) for body in bodies[1:]]
        attention = self._merge(inputs, rotations, [part for part, *_ in splits])
        if not inputs.skip:
            return attention
        return attention._replace(reads=mx.concatenate([reads for _, reads in splits]))

    def _split(
        self, inputs: DecodeInputs, rotations: Hadamards, body: Body | None, with_rows: bool
    ) -> list[mx.array]:
        """Parts [Hq * L, splits, Dv + 2] of one tier; with `skip` also what was read, [n, 2]."""
        queries, exact, centers = inputs.queries, inputs.exact, inputs.centers
        rotation = rotations[0] if rotations else None
        heads, v_dim = exact.k.shape[0], exact.v.shape[2]
        tiles, rows = _tiles(queries, heads), _query_rows(queries, heads)
        geometry = self.launch.geometry(shape_of(queries, body, exact, with_rows))
        template: Template = {
            "KF": 0, "VF": 0, "KC": exact.k.shape[2] // 32, "VC": v_dim // 32,
            **(format_template(body.format) if body else {}),
            "BLOCK": rotation.block if rotation else 0,
            "S": self.launch.strategy,
            "R": -(-rows // tiles),
            "T": geometry.blocks,
            "NSG": geometry.simd_groups,
            "BODY": body is not None,
            "EXACT": with_rows,
            "CAUSAL": inputs.mask == "causal" and queries.shape[1] > 1,
        }  # fmt: skip
        none, no_index = nothing(mx.float32), nothing(mx.int32)
        assert body is None or centers is not None  # fitted before the first body was encoded
        arrays = [
            queries,
            rotation.signs if rotation else none,
            constant(inputs.scale * _LOG2_E),
            body.pool if body else nothing(mx.uint32),
            body.table if body else no_index,
            body.lengths if body else no_index,
            *(centers if body and centers else (none, none)),
            *(x if x.size else nothing(x.dtype) for x in exact),
        ]
        outputs: list[Output] = [((heads * rows, geometry.splits, v_dim + 2), mx.float32)]
        if inputs.skip:
            arrays.append(constant(log2(inputs.skip)))
            groups = heads * tiles * geometry.splits * geometry.simd_groups
            outputs.append(((groups, 2), mx.int32))
        return self.launch(
            SKIPPING if inputs.skip else SPLITS,
            arrays,
            template,
            (32 * geometry.simd_groups * tiles, heads, geometry.splits),
            (32 * geometry.simd_groups, 1, 1),
            outputs,
        )

    def _merge(
        self, inputs: DecodeInputs, rotations: Hadamards, parts: list[mx.array]
    ) -> Attention:
        query_heads, tokens, _ = inputs.queries.shape
        rotation, dim = rotations[1] if rotations else None, inputs.exact.v.shape[2]
        head_dim = rotation.head_dim if rotation else dim
        none = nothing(mx.float32)
        out, lse = self.launch(
            merge_kernel(len(parts)),
            [
                *parts,
                none if inputs.sink_logits is None else inputs.sink_logits,
                rotation.signs if rotation else none,
            ],
            {
                "VC": dim // 32,
                "BLOCK": rotation.block if rotation else 0,
                "TOKENS": tokens,
                "HEAD_DIM": head_dim,
                "SINK": inputs.sink_logits is not None,
            },
            (32, query_heads * tokens, 1),
            (32, 1, 1),
            [
                ((query_heads, tokens, head_dim), inputs.queries.dtype if rotation else mx.float32),
                ((query_heads, tokens), mx.float32),
            ],
        )
        return Attention(out, lse)
