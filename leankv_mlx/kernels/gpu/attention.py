"""Decode attention on a GPU: one launch for each tier, one merge, no synchronization."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2

import mlx.core as mx

from leankv_mlx.codec.rotation import Hadamard
from leankv_mlx.kernels.decode_attention import (
    between_rotations,
    decode_attention_ops,
    scaled_queries,
)
from leankv_mlx.kernels.gpu.geometry import Shape
from leankv_mlx.kernels.gpu.launch import (
    Kernel,
    Launcher,
    Output,
    Template,
    constant,
    format_template,
    hadamards,
    in_order,
    nothing,
)
from leankv_mlx.kernels.gpu.stored import Column, Stored, groups
from leankv_mlx.kernels.types import Attention, Mask, Scales, View

MAX_ROWS = 8
"""Query rows of a KV head that one threadgroup takes: they live in registers."""
MAX_PARTS = 12
"""Launches whose splits one merge takes as they are: each is 2 of the 31 buffers that Metal has
room for, its shape included, and a merge has up to 5 others."""
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
  const int head = (int)threadgroup_position_in_grid.y, tokens = queries_shape[1];
  const int query_rows = queries_shape[0] / (int)threadgroups_per_grid.y * tokens;
{place}  const lkv_reads count =
      lkv_decode_attention<KF, VF, KC, VC, BLOCK, S, R, T, NSG, BODY, EXACT, {skip}>(
          queries, query_rows, tokens, queries_shape[2], signs, scale[0], pool, table + {ids},
          BODY ? lengths[head] : 0, mu_k, mu_v, keys + (size_t)({first}) * (KC * 32),
          values + (size_t)({first}) * (VC * 32), {exact}, CAUSAL, {log_skip}, part,
          threadgroup_position_in_grid.x, head, threadgroup_position_in_grid.z,
          threadgroups_per_grid.z, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
          shared);
"""
_READS = """  if (thread_index_in_simdgroup == 0) {
    const int group = (int)((threadgroup_position_in_grid.y * threadgroups_per_grid.x +
                             threadgroup_position_in_grid.x) * threadgroups_per_grid.z +
                            threadgroup_position_in_grid.z) * NSG +
                      (int)simdgroup_index_in_threadgroup;
    reads[2 * group] = count.read;
    reads[2 * group + 1] = count.all;
  }
"""


@lru_cache
def attention_kernel(pools: int = 0, skip: bool = False) -> Kernel:
    """The kernel that leaves the splits of one tier.

    Args:
        pools: that the tiers of several sequences lie in; 0 for one sequence.
        skip: it may leave values out, and every SIMD group also leaves what it read,
            `Attention.reads`.
    """
    name, inputs, outputs = "leankv_decode_attention", [*_INPUTS], ["part"]
    files = ["layout.metal", "values.metal", "rotate.metal", "decode_attention.metal"]
    where = {"place": "", "ids": "head * table_shape[1]", "first": "head * keys_shape[1]",
             "exact": "keys_shape[1]"}  # fmt: skip
    if pools:
        name += f"_{pools}"
        names = [f"pool{i}" for i in range(pools)]
        at = inputs.index("pool")
        inputs[at : at + 1] = names
        inputs.append("places")
        files.append("places.metal")
        where = {"place": _place(names), "ids": "place.ids", "first": "place.first",
                 "exact": "place.exact"}  # fmt: skip
    if skip:
        name += "_skip"
        inputs.append("log_skip")
        outputs.append("reads")
    body = _BODY.format(
        **where, skip="true" if skip else "false", log_skip="log_skip[0]" if skip else "0.0f"
    )
    return Kernel(
        name,
        tuple(files),
        tuple(inputs),
        tuple(outputs),
        _TEMPLATE,
        body + (_READS if skip else "  (void)count;\n"),
    )


def _place(pools: Sequence[str]) -> str:
    """Text that finds what a row of several sequences has, `pool` included."""
    others = "".join(
        f"  if (place.pool == {i}) pool = {name};\n" for i, name in enumerate(pools) if i
    )
    return f"""  const lkv_place place =
      lkv_place_of(places, head, (int)threadgroups_per_grid.y / places_shape[0]);
  const DEV uint* pool = {pools[0]};
{others}"""


SPLITS, SKIPPING = attention_kernel(), attention_kernel(skip=True)
"""Of one sequence."""


@lru_cache
def merge_kernel(parts: int) -> Kernel:
    """The kernel that merges the splits of so many launches. Sequences share their sink logits."""
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
{merges}  if (SINK) {{
    lkv_merge_logit<VC>((float)sink_logits[row / TOKENS % sink_logits_shape[0]], merged);
  }}
  lkv_merge_store<VC, BLOCK>(merged, signs, HEAD_DIM, row, lane, out, lse);
""",
    )


def shape_of(queries: mx.array, views: Sequence[View], column: Column, with_rows: bool) -> Shape:
    """What the launch of a column of tiers depends on: queries [B * Hq, L, head_dim] of B views."""
    exact = views[0].exact
    heads = exact.k.shape[0]
    slots = [
        (tier.slots if tier else 0) + (view.exact.k.shape[1] if with_rows else 0)
        for view, tier in zip(views, column, strict=True)
    ]
    longest = max(slots)
    # Sequences that are shorter than the longest count as much as they are: one long one among
    # short ones is split as if it were alone.
    full = -(-heads * sum(slots) // longest) if longest else heads * len(views)
    tiles = _tiles(_query_rows(queries, heads * len(views)))
    return Shape(full * tiles, max(exact.k.shape[2], exact.v.shape[2]), longest)


def _query_rows(queries: mx.array, heads: int) -> int:
    return int(queries.shape[0]) // heads * int(queries.shape[1])


def _tiles(query_rows: int) -> int:
    """Threadgroups that share the query rows of a KV head."""
    return -(-query_rows // MAX_ROWS)


@dataclass(frozen=True)
class _Call:
    """What is attended to, and how. `queries` are those of all sequences, [B * Hq, L, head_dim].
    `rotations` are those that the kernels apply themselves; None where queries and output are
    rotated."""

    queries: mx.array
    stored: Stored
    scale: float
    causal: bool
    sink_logits: mx.array | None
    rotations: tuple[Hadamard, Hadamard] | None

    @property
    def heads(self) -> int:
        """KV heads of all sequences."""
        return len(self.views) * int(self.views[0].exact.k.shape[0])

    @property
    def views(self) -> Sequence[View]:
        """Of the sequences."""
        return self.stored.views

    @property
    def skip(self) -> float:
        """Of the sequences that have something to skip."""
        return max(view.skip for view in self.views)


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
        if isinstance(mask, mx.array):
            return decode_attention_ops(
                queries, view, scale=scale, mask=mask, sink_logits=sink_logits
            )
        if view.rotations and hadamards(view.rotations) is None:
            return between_rotations(
                self, queries, view, scale=scale, mask=mask, sink_logits=sink_logits
            )
        stored, rotations = Stored.of([view]), hadamards(view.rotations)
        causal, queries = mask == "causal", in_order(queries, view.rotations)
        return self._attend(_Call(queries, stored, scale, causal, sink_logits, rotations))

    def batch(
        self,
        queries: mx.array,
        views: Sequence[View],
        *,
        scale: float,
        mask: str | None,
        sink_logits: mx.array | None,
        scales: Scales,
    ) -> Attention:
        """The operation on a batch; see `kernels.decode_attention.decode_attention_batch`.

        Neighbours whose tiers lie in few pools are one launch for each format, and one merge. How
        a row is split depends on the other rows, so what a sequence gets is what it gets alone up
        to rounding. A rotation that is no Hadamard runs as plain MLX ops.
        """
        queries = scaled_queries(queries, scales)
        rotations = hadamards(views[0].rotations)
        if views[0].rotations and rotations is None:
            k, v = views[0].rotations
            inside = [replace(view, rotations=None) for view in views]
            attention = self.batch(
                k.apply(queries.astype(mx.float32)), inside,
                scale=scale, mask=mask, sink_logits=sink_logits, scales=[None] * len(views),
            )  # fmt: skip
            return attention._replace(out=v.undo(attention.out).astype(queries.dtype))
        queries = in_order(queries, views[0].rotations)
        causal, heads = isinstance(mask, str), queries.shape[1]  # no array, see there
        found = []
        for group in groups(views):
            rows, stored = queries[group].flatten(0, 1), Stored.of(views[group])
            call = _Call(rows, stored, scale, causal, sink_logits, rotations)
            out, lse, reads = self._attend(call)
            out, lse = (x.reshape(-1, heads, *x.shape[1:]) for x in (out, lse))
            found.append(Attention(out, lse, reads))
        return _concatenated(found)

    def _attend(self, call: _Call) -> Attention:
        """The exact rows go with the first column of tiers."""
        has_rows = any(view.exact.k.shape[1] for view in call.views)
        splits = [
            self._split(call, column, has_rows and i == 0)
            for i, column in enumerate(call.stored.columns())
        ]
        attention = self._merge(call, [part for part, *_ in splits])
        if not call.skip:
            return attention
        return attention._replace(reads=mx.concatenate([reads for _, reads in splits]))

    def _split(self, call: _Call, column: Column, with_rows: bool) -> list[mx.array]:
        """Parts [B * Hq * L, splits, Dv + 2] of a column; with `skip` also [n, 2]: `reads`."""
        exact, heads = call.views[0].exact, call.heads
        rotation = call.rotations[0] if call.rotations else None
        tier = next((tier for tier in column if tier), None)
        rows, v_dim = _query_rows(call.queries, heads), exact.v.shape[2]
        tiles = _tiles(rows)
        geometry = self.launch.geometry(shape_of(call.queries, call.views, column, with_rows))
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
            "CAUSAL": call.causal and call.queries.shape[1] > 1,
        }  # fmt: skip
        pools, others = call.stored.inputs(column)
        signs = rotation.signs if rotation else nothing(mx.float32)
        inputs = [call.queries, signs, constant(call.scale * _LOG2_E), *pools, *others]
        outputs: list[Output] = [((heads * rows, geometry.splits, v_dim + 2), mx.float32)]
        if call.skip:
            inputs.append(constant(log2(call.skip)))
            count = heads * tiles * geometry.splits * geometry.simd_groups
            outputs.append(((count, 2), mx.int32))
        alone = len(call.views) == 1
        return self.launch(
            attention_kernel(0 if alone else len(pools), skip=call.skip > 0),
            inputs,
            template,
            (32 * geometry.simd_groups * tiles, heads, geometry.splits),
            (32 * geometry.simd_groups, 1, 1),
            outputs,
        )

    def _merge(self, call: _Call, parts: list[mx.array]) -> Attention:
        if len(parts) > MAX_PARTS:
            parts = [mx.concatenate(parts, axis=1)]  # more splits of one
        query_heads, tokens, _ = call.queries.shape
        rotation = call.rotations[1] if call.rotations else None
        dim = call.views[0].exact.v.shape[2]
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


def _concatenated(found: Sequence[Attention]) -> Attention:
    """Of all groups of a batch."""
    if len(found) == 1:
        return found[0]
    reads = [attention.reads for attention in found if attention.reads is not None]
    return Attention(
        mx.concatenate([attention.out for attention in found]),
        mx.concatenate([attention.lse for attention in found]),
        mx.concatenate(reads) if reads else None,
    )
