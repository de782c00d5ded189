"""Rows by quantized weights on a GPU: one launch for all weights of an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import mlx.core as mx

from leankv_mlx.kernels.gpu.launch import SHUFFLE, Kernel, Launcher, Output, Template, nothing

MAX_ROWS = 8
MAX_WEIGHTS = 4
"""Of a launch; Metal has 31 places for arrays."""
LEAST_OUTPUTS = 8
"""Of a weight: MLX puts arrays of fewer elements into another kind of memory."""
_WORDS = 16
"""Words of an input channel in a tile; see metal/project.metal."""
_FEW_STRIPS = 128
"""Below so many strips they are halved, down to the 32 bytes that memory hands out; an estimate
from the count of cores, not measured."""
_GATES = {None: 0, "silu": 1, "gelu_approx": 2}


class Quantized(Protocol):
    """Arrays of a weight [N, K] in the layout of metal/project.metal."""

    @property
    def codes(self) -> mx.array: ...
    @property
    def scales(self) -> mx.array: ...
    @property
    def biases(self) -> mx.array: ...
    @property
    def outputs(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...


@dataclass(frozen=True)
class Spread:
    """How a product is spread.

    Attributes:
        rows: of a threadgroup.
        words: of an input channel that a threadgroup takes.
        words_of_lane: those of them that a lane takes.
        simd_groups: of a threadgroup.
    """

    rows: int
    words: int
    words_of_lane: int
    simd_groups: int


def spread(rows: int, groups: int, bits: int, tiles: int) -> Spread:
    """How rows by `tiles` tiles are spread, each with so many groups of input channels: the sums of
    all rows and codes of a word live in registers, and those of each SIMD group in the 32 KB that a
    threadgroup has on Metal."""
    codes = 32 // bits
    each = -(-rows // -(-rows * codes // 64))
    light = each * codes <= 16
    return Spread(
        rows=each,
        words=_WORDS if light and tiles >= _FEW_STRIPS else _WORDS // 2,
        words_of_lane=2 if each * codes <= 8 else 1,
        simd_groups=min(16 if light else 8, groups),
    )


_BEFORE = """
  constexpr int E = (R * L * (32 / B) + NSG * 32 - 1) / (NSG * 32);
  TG_ARRAY(float, tg_inputs, NSG * 32 * R);
  TG_ARRAY(int, tg_channels, KEEP ? NSG * 32 : 1);
  TG_ARRAY(float, tg_outs, NSG * R * L * (32 / B));
  TG_ARRAY(float, tg_squares, NORM ? NSG * R : 1);
  TG_ARRAY(float, tg_kept, KEEP ? NSG : 1);
  lkv_project_shared shared;
  shared.inputs = tg_inputs;
  shared.channels = tg_channels;
  shared.outs = tg_outs;
  shared.squares = tg_squares;
  shared.kept = tg_kept;
  const uint lane = thread_index_in_simdgroup, simd_group = simdgroup_index_in_threadgroup;
  const int rows = x_shape[0], row = (int)threadgroup_position_in_grid.y * R;
  int strip = (int)threadgroup_position_in_grid.x;
  auto given = lkv_inputs_of<R>(x, rows, row, x_shape[1], norm, columns, numbers[1]);
  if (NORM) lkv_normalize<NSG>(numbers[0], lane, simd_group, shared.squares, given);
  float elements[E];
"""
_WEIGHT = (
    "lkv_weight_of(codes{i}, scales{i}, zeros{i}, sizes[{i}], (BIASED >> {i} & 1) != 0, bias{i})"
)
_STRIP = """lkv_strip<B, QUADS, GROUP, L, V, NSG, NORM, KEEP>(
      given, {weight}, strip, lane, simd_group, shared, {elements});
"""
_NEXT = """  strips = lkv_strips<B, L>(sizes[{before}]);
  if (which == {before} && strip >= strips) {{
    which = {i};
    strip -= strips;
    weight = {weight};
    out = out{i};
  }}
"""
_GATE = """  UNROLL for (int e = 0; e < E; e++) elements[e] *= lkv_gate<GATE>(firsts[e]);
"""
_STORE = """  lkv_store_strip<B, L, V, R, NSG, RESIDUAL>(
      elements, row, rows, strip, {outputs}, residual, lane, simd_group, {out});
"""
_READ = """  if (threadgroup_position_in_grid.x == 0) {
    const int all = lkv_all_kept<NSG>(kept, lane, simd_group, shared.kept);
    if (simd_group == 0 && lane == 0) read[threadgroup_position_in_grid.y] = all;
  }
"""


@lru_cache
def project_kernel(count: int, *, gated: bool, keep: bool) -> Kernel:
    """The kernel for so many weights; with a gate for two of one size."""
    weights = [_WEIGHT.format(i=i) for i in range(count)]
    strip = "  const float kept = " + _STRIP
    if gated:
        body = "  float firsts[E];\n"
        body += "  " + _STRIP.format(weight=weights[0], elements="firsts")
        body += strip.format(weight=weights[1], elements="elements") + _GATE
        body += _STORE.format(outputs="sizes[0]", out="out0")
    else:
        body = f"  auto weight = {weights[0]};\n  auto out = out0;\n"
        if count > 1:
            body += "  int which = 0, strips;\n"
        body += "".join(_NEXT.format(i=i, before=i - 1, weight=weights[i]) for i in range(1, count))
        body += strip.format(weight="weight", elements="elements")
        body += _STORE.format(outputs="weight.outputs", out="out")
    names = [f"{name}{i}" for i in range(count) for name in ("codes", "scales", "zeros", "bias")]
    outs = [f"out{i}" for i in range(1 if gated else count)]
    return Kernel(
        f"leankv_project_{count}{'_gated' if gated else ''}{'_keep' if keep else ''}",
        ("project.metal",),
        ("x", *names, "sizes", "norm", "columns", "numbers", "residual"),
        (*outs, "read") if keep else tuple(outs),
        ("B", "QUADS", "GROUP", "R", "L", "V", "NSG", "NORM", "KEEP", "BIASED", "GATE", "RESIDUAL"),
        _BEFORE + body + (_READ if keep else "  (void)kept;\n"),
    )


UNPACK = Kernel(
    "leankv_unpack_weight",
    ("project.metal",),
    ("codes", "scales", "zeros", "sizes"),
    ("dense",),
    ("B", "QUADS", "GROUP"),
    """
  const int lane = (int)thread_index_in_simdgroup;
  const int channel = (int)threadgroup_position_in_grid.x * 32 +
                      (int)simdgroup_index_in_threadgroup * 2 + lane / LKV_WORDS;
  const auto weight = lkv_weight_of(codes, scales, zeros, sizes[0], false, scales);
  lkv_unpack_word<B, QUADS, GROUP>(weight, codes_shape[1], (int)threadgroup_position_in_grid.y,
                                   channel, lane % LKV_WORDS, dense);
""",
)


@lru_cache(maxsize=1024)
def _numbers(*values: float) -> mx.array:
    return mx.array(values, mx.float32)


@lru_cache(maxsize=1024)
def _sizes(*outputs: int) -> mx.array:
    return mx.array(outputs, mx.int32)


@dataclass(frozen=True)
class Project:
    """The products of rows with weights of one kind, and what is around them.

    Attributes:
        launch: launches the kernels.
    """

    launch: Launcher

    def takes(self, rows: int, weights: Sequence[Quantized]) -> bool:
        """Whether one launch can do it: few rows, weights of the same bits, group and dtype."""
        kinds = {(w.bits, w.group, w.scales.dtype) for w in weights}
        return (
            0 < rows <= MAX_ROWS
            and len(kinds) == 1
            and len(weights) <= MAX_WEIGHTS
            and all(w.outputs >= LEAST_OUTPUTS for w in weights)
        )

    def __call__(
        self,
        x: mx.array,
        weights: Sequence[Quantized],
        dtype: mx.Dtype,
        *,
        biases: Sequence[mx.array | None],
        norm: tuple[mx.array, float] | None = None,
        keep: tuple[float, mx.array | None] | None = None,
        residual: mx.array | None = None,
        gate: Literal["silu", "gelu_approx"] | None = None,
    ) -> tuple[list[mx.array], mx.array | None]:
        """Outputs [rows, N] of a dtype, and with `keep` what was kept, int32 []; the arguments are
        those of `projections.project.project`.

        Args:
            x: [rows, K], what `takes` takes.
            residual: [rows, N].
        """
        rows, inputs = x.shape
        tiles = sum(weight.codes.shape[0] for weight in weights)
        way = spread(rows, inputs // weights[0].group, weights[0].bits, tiles)
        strips = tiles * (_WORDS // way.words) // (2 if gate else 1)
        row_tiles, none = -(-rows // way.rows), nothing(x.dtype)
        arrays = [x]
        for weight, bias in zip(weights, _of_one_dtype(biases, x.dtype), strict=True):
            arrays += [weight.codes, weight.scales, weight.biases, bias]
        arrays += [
            _sizes(*(weight.outputs for weight in weights)),
            none if norm is None else norm[0],
            nothing(mx.float32) if keep is None or keep[1] is None else keep[1],
            _numbers(norm[1] if norm else 0.0, keep[0] if keep else 0.0),
            none if residual is None else residual,
        ]
        made = weights[:1] if gate else weights
        outputs: list[Output] = [((rows, weight.outputs), dtype) for weight in made]
        if keep:
            outputs.append(((row_tiles,), mx.int32))
        template: Template = {
            **self._layout(weights[0]),
            "R": way.rows,
            "L": way.words,
            "V": way.words_of_lane,
            "NSG": way.simd_groups,
            "NORM": norm is not None,
            "KEEP": 0 if keep is None else 1 if keep[1] is None else 2,
            "BIASED": sum((bias is not None) << i for i, bias in enumerate(biases)),
            "GATE": _GATES[gate],
            "RESIDUAL": residual is not None,
        }
        outs = self.launch(
            project_kernel(len(weights), gated=gate is not None, keep=keep is not None),
            arrays,
            template,
            (32 * way.simd_groups * strips, row_tiles, 1),
            (32 * way.simd_groups, 1, 1),
            outputs,
        )
        return (outs[:-1], outs[-1].sum()) if keep else (outs, None)

    def unpack(self, weight: Quantized, dtype: mx.Dtype) -> mx.array:
        """The numbers of a weight, [K, N]: what many rows are multiplied by."""
        tiles, inputs, _ = weight.codes.shape
        (dense,) = self.launch(
            UNPACK,
            [weight.codes, weight.scales, weight.biases, _sizes(weight.outputs)],
            self._layout(weight),
            (_WORDS * inputs, tiles, 1),
            (_WORDS * 32, 1, 1),
            [((inputs, weight.outputs), dtype)],
        )
        return dense

    def _layout(self, weight: Quantized) -> Template:
        quads = self.launch.strategy == SHUFFLE
        return {"B": weight.bits, "QUADS": quads, "GROUP": weight.group}


def _of_one_dtype(biases: Sequence[mx.array | None], default: mx.Dtype) -> list[mx.array]:
    """The kernel sees them through pointers of one type, those that are not there too."""
    dtypes = {bias.dtype for bias in biases if bias is not None} or {default}
    dtype = dtypes.pop() if len(dtypes) == 1 else mx.float32
    return [nothing(dtype) if bias is None else bias.astype(dtype) for bias in biases]
