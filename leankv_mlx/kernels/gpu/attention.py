"""Decode attention on a GPU: one launch for each tier, one merge, no synchronization."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
    format_template,
    nothing,
)
from leankv_mlx.kernels.types import Attention, Mask, Rows, Tier, View

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


def shape_of(queries: mx.array, tier: Tier | None, exact: Rows, with_rows: bool) -> Shape:
    """What the launch of a tier depends on."""
    heads = exact.k.shape[0]
    slots = (tier.slots if tier else 0) + (exact.k.shape[1] if with_rows else 0)
    dim = max(exact.k.shape[2], exact.v.shape[2])
    return Shape(heads * _tiles(queries, heads), dim, slots)


def _query_rows(queries: mx.array, heads: int) -> int:
    return int(queries.shape[0]) // heads * int(queries.shape[1])


def _tiles(queries: mx.array, heads: int) -> int:
    """Threadgroups that share the query rows of a KV head."""
    return -(-_query_rows(queries, heads) // MAX_ROWS)


@dataclass(frozen=True)
class _Call:
    """What is attended to, and how. `rotations` are those that the kernels apply themselves; None
    where queries and output are rotated."""

    queries: mx.array
    view: View
    scale: float
    causal: bool
    sink_logits: mx.array | None
    rotations: tuple[Hadamard, Hadamard] | None


@dataclass(frozen=True)
class DecodeAttention:
    """The operation; see `kernels.decode_attention.decode_attention`."""

    launch: Launcher

    def __call__(
        self,
        queries: mx.array,
        view: View,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None,
    ) -> Attention:
        """An array as mask runs as plain MLX ops, and so does a rotation that is no Hadamard."""
        plain = isinstance(mask, mx.array)
        rotations = None
        if view.rotations is not None:
            k, v = view.rotations
            rotations = (k, v) if isinstance(k, Hadamard) and isinstance(v, Hadamard) else None
        if plain or (view.rotations and rotations is None):
            attend = decode_attention_ops if plain else partial(between_rotations, self)
            return attend(queries, view, scale=scale, mask=mask, sink_logits=sink_logits)
        call = _Call(queries, view, scale, mask == "causal", sink_logits, rotations)
        return self._attend(call)

    def _attend(self, call: _Call) -> Attention:
        """The exact rows go with the first tier."""
        view = call.view
        tiers: Sequence[Tier | None] = view.tiers or [None]
        has_rows = view.exact.k.shape[1] > 0
        splits = [self._split(call, tier, has_rows and i == 0) for i, tier in enumerate(tiers)]
        attention = self._merge(call, [part for part, *_ in splits])
        if not view.skip:
            return attention
        return attention._replace(reads=mx.concatenate([reads for _, reads in splits]))

    def _split(self, call: _Call, tier: Tier | None, with_rows: bool) -> list[mx.array]:
        """Parts [Hq * L, splits, Dv + 2] of one tier; with `skip` also what was read, [n, 2]."""
        queries, exact, centers = call.queries, call.view.exact, call.view.centers
        rotation = call.rotations[0] if call.rotations else None
        heads, v_dim = exact.k.shape[0], exact.v.shape[2]
        tiles, rows = _tiles(queries, heads), _query_rows(queries, heads)
        geometry = self.launch.geometry(shape_of(queries, tier, exact, with_rows))
        template: Template = {
            "KF": 0, "VF": 0, "KC": exact.k.shape[2] // 32, "VC": v_dim // 32,
            **(format_template(tier.format) if tier else {}),
            "BLOCK": rotation.block if rotation else 0,
            "S": self.launch.strategy,
            "R": -(-rows // tiles),
            "T": geometry.blocks,
            "NSG": geometry.simd_groups,
            "BODY": tier is not None,
            "EXACT": with_rows,
            "CAUSAL": call.causal and queries.shape[1] > 1,
        }  # fmt: skip
        none, no_index = nothing(mx.float32), nothing(mx.int32)
        assert tier is None or centers is not None  # fitted before the first block was encoded
        arrays = [
            queries,
            rotation.signs if rotation else none,
            constant(call.scale * _LOG2_E),
            tier.pool if tier else nothing(mx.uint32),
            tier.table if tier else no_index,
            tier.lengths if tier else no_index,
            *(centers if tier and centers else (none, none)),
            *(x if x.size else nothing(x.dtype) for x in exact),
        ]
        outputs: list[Output] = [((heads * rows, geometry.splits, v_dim + 2), mx.float32)]
        if call.view.skip:
            arrays.append(constant(log2(call.view.skip)))
            groups = heads * tiles * geometry.splits * geometry.simd_groups
            outputs.append(((groups, 2), mx.int32))
        return self.launch(
            SKIPPING if call.view.skip else SPLITS,
            arrays,
            template,
            (32 * geometry.simd_groups * tiles, heads, geometry.splits),
            (32 * geometry.simd_groups, 1, 1),
            outputs,
        )

    def _merge(self, call: _Call, parts: list[mx.array]) -> Attention:
        query_heads, tokens, _ = call.queries.shape
        rotation, dim = call.rotations[1] if call.rotations else None, call.view.exact.v.shape[2]
        head_dim = rotation.head_dim if rotation else dim
        none = nothing(mx.float32)
        out, lse = self.launch(
            merge_kernel(len(parts)),
            [
                *parts,
                none if call.sink_logits is None else call.sink_logits,
                rotation.signs if rotation else none,
            ],
            {
                "VC": dim // 32,
                "BLOCK": rotation.block if rotation else 0,
                "TOKENS": tokens,
                "HEAD_DIM": head_dim,
                "SINK": call.sink_logits is not None,
            },
            (32, query_heads * tokens, 1),
            (32, 1, 1),
            [
                ((query_heads, tokens, head_dim), call.queries.dtype if rotation else mx.float32),
                ((query_heads, tokens), mx.float32),
            ],
        )
        return Attention(out, lse)
