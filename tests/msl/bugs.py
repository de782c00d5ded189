"""Two small kernels, and the bugs that the checker has to find when they are planted in them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.kernels.gpu.launch import Kernel
from tests.msl.launcher import MslLauncher

ROWS, WIDTH = 3, 128

# Each row divided by its sum; the SIMD groups of a threadgroup share one row.
NORMALIZE = Kernel(
    "normalize", (), ("x", "shift"), ("out",), ("WIDTH",),
    """
  TG_ARRAY(float, sums, WIDTH / 32);
  const uint lane = thread_index_in_simdgroup;
  const uint group = simdgroup_index_in_threadgroup;
  const uint i = threadgroup_position_in_grid.x * WIDTH + thread_index_in_threadgroup;
  const float value = x[i];
  const float sum = simd_sum(value);
  if (lane == 0) sums[group] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (uint k = 0; k < WIDTH / 32; k++) total += sums[k];
  out[i] = value / total + (float)(1 << shift[0]);
""",
)  # fmt: skip

# Neighbours swapped, twice, within SIMD groups only.
SWAP = Kernel(
    "swap", (), ("x",), ("out",), ("WIDTH",),
    """
  TG_ARRAY(float, shared, WIDTH);
  const uint t = thread_index_in_threadgroup;
  const uint i = threadgroup_position_in_grid.x * WIDTH + t;
  shared[t] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const float other = shared[t ^ 1u];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  shared[t] = other;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = simd_shuffle_xor(shared[t ^ 1u], (ushort)1);
""",
)  # fmt: skip


@dataclass(frozen=True)
class Bug:
    """`old` in the source becomes `new`; the error has to match the expression `says`."""

    name: str
    kernel: Kernel
    old: str
    new: str
    says: str


_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_SIMD_BARRIER = "  simdgroup_barrier(mem_flags::mem_threadgroup);\n"
_HELPER = "#define LKV_NEVER"

FOUND_BY_THE_CHECKER = (
    Bug("missing barrier", NORMALIZE, _BARRIER, "", "RACE|UNINITIALISED"),
    Bug("barrier that orders nothing", NORMALIZE,
        "flags::mem_threadgroup", "flags::mem_none", "RACE"),
    Bug("barrier for device memory", NORMALIZE,
        "flags::mem_threadgroup", "flags::mem_device", "RACE"),
    Bug("SIMD barrier for all", NORMALIZE, _BARRIER, "simdgroup_" + _BARRIER[12:], "RACE|UNINIT"),
    Bug("missing SIMD barrier", SWAP, _SIMD_BARRIER + "  const", "  const", "RACE|UNINITIALISED"),
    Bug("write after read", SWAP, _SIMD_BARRIER + "  shared", "  shared", "RACE"),
    Bug("read past the end", NORMALIZE, "= x[i]", "= x[i + 1]", "OUT OF BOUNDS read.*\n.*of x"),
    Bug("read before the start", NORMALIZE, "= x[i]", "= x[(int)i - 1]", "OUT OF BOUNDS read"),
    Bug("write past the end", NORMALIZE, "out[i] =", "out[i + 1] =", "OUT OF BOUNDS write"),
    Bug("threadgroup index", NORMALIZE, "sums[group] =", "sums[group + 1] =", "UNDEFINED.*bounds"),
    Bug("threadgroup pointer", NORMALIZE, "total += sums[k]",
        "{ TG_PTR(float) p = sums; total += p[k + 1024]; }", "OUT OF BOUNDS|UNDEFINED"),
    Bug("uninitialised threadgroup memory", NORMALIZE,
        "if (lane == 0) sums", "if (lane == 40) sums",
        "UNINITIALISED threadgroup"),
    Bug("diverged SIMD operation", NORMALIZE,
        "= simd_sum(value)", "= lane < 16 ? simd_sum(value) : 0",
        "DEADLOCK|DIVERGENT"),
    Bug("SIMD operations in two places", NORMALIZE, "= simd_sum(value)",
        "= lane < 16 ? simd_sum(value) : simd_sum(2 * value)", "DIVERGENT"),
    Bug("diverged barrier", NORMALIZE,
        _BARRIER, "if (group != 3) " + _BARRIER, "DEADLOCK|DIVERGENT|RACE"),
    Bug("early return", NORMALIZE, _BARRIER, "if (group == 3) return; " + _BARRIER, "DEADLOCK"),
    Bug("unwritten output", NORMALIZE,
        "out[i] =", "if (lane < 30) out[i] =", "UNWRITTEN output out"),
    Bug("two writers", NORMALIZE, "out[i] =", "out[i & ~1u] =", "RACE on byte .* of out"),
    Bug("two threadgroups write", NORMALIZE,
        "out[i] =", "out[i % WIDTH] =", "RACE on byte .* of out"),
    Bug("output read unwritten", NORMALIZE, "float total = 0.0f", "float total = out[i]",
        "UNINITIALISED byte"),
    Bug("output of another thread", SWAP, "  out[i] =", "  if (t == 0) out[i + 1] = 0;\n  out[i] =",
        "RACE on byte .* of out"),
    Bug("shift too far", NORMALIZE, "1 << shift[0]", "1 << (shift[0] + 32)", "UNDEFINED shift"),
    Bug("integer overflow", NORMALIZE, "1 << shift[0]", "2147483647 + shift[0]", "UNDEFINED add"),
    Bug("float too large for int", NORMALIZE, "1 << shift[0]", "(int)(1e20f * value)",
        "UNDEFINED float_cast"),
    Bug("too much threadgroup memory", NORMALIZE,
        "sums, WIDTH / 32", "sums, 64 * WIDTH + 1 + WIDTH",
        "threadgroup memory"),
)  # fmt: skip

FOUND_BY_THE_COMPILER = (
    Bug("double constant", NORMALIZE, "value / total", "value / (2.0 * total)", "double"),
    Bug("double", NORMALIZE, "float total = 0.0f", "double total = 0.0f", "double"),
    Bug("address spaces", NORMALIZE, "float total", "threadgroup float* p = out; float total",
        "__local float"),
    Bug("write to an input", NORMALIZE, "float total", "x[i] = 1; float total", "read-only"),
    Bug("write to a constant", NORMALIZE, "float total", "shift[0] = 1; float total", "read-only"),
    Bug("uninitialised local", NORMALIZE, "float total = 0.0f", "float total", "uninitialized"),
    Bug("C++17", NORMALIZE,
        "if (lane == 0)", "if constexpr (WIDTH > 0) if (lane == 0)", "extension"),
    Bug("a keyword of Metal", NORMALIZE,
        "const float value", "const float device = 0; const float value",
        "error"),
)  # fmt: skip

FOUND_BY_THE_LINT = (
    Bug("lambda", NORMALIZE, "float total", "auto f = [&](int a) { return a; }; float total",
        "lambda"),
    Bug("cast between address spaces", NORMALIZE, "float total",
        "threadgroup float* p = (threadgroup float*)out; float total", "address space"),
    Bug("static local", NORMALIZE,
        "float total", "\n  static int calls = 0;\n  float total", "static"),
    Bug("recursion", NORMALIZE, _HELPER,
        "DEVFN int odd(int n) { return n ? odd(n - 1) : 0; }\n" + _HELPER, "recursion"),
    Bug("threadgroup variable in a helper", NORMALIZE, _HELPER,
        "DEVFN void f() { TG_ARRAY(float, x, 4); }\n" + _HELPER, "threadgroup variable"),
    Bug("goto", NORMALIZE, "float total", "goto end; end: float total", "goto"),
    Bug("too many buffers", NORMALIZE, _HELPER,
        "void f(device float* x [[buffer(31)]]);\n" + _HELPER, "31 of Metal"),
    Bug("C++ library", NORMALIZE, _HELPER, "#include <cmath>\n" + _HELPER, "C\\+\\+ library"),
)  # fmt: skip


def run(kernel: Kernel, launch: MslLauncher) -> mx.array:
    """The kernel on random numbers."""
    x = mx.random.uniform(1.0, 2.0, (ROWS, WIDTH), key=mx.random.key(1))
    inputs = [x, mx.array([4], mx.int32)][: len(kernel.inputs)]
    (out,) = launch(
        kernel, inputs, {"WIDTH": WIDTH}, (ROWS * WIDTH, 1, 1), (WIDTH, 1, 1),
        [((ROWS, WIDTH), mx.float32)],
    )  # fmt: skip
    return out


def expected(kernel: Kernel) -> mx.array:
    x = mx.random.uniform(1.0, 2.0, (ROWS, WIDTH), key=mx.random.key(1))
    if kernel is NORMALIZE:
        return x / x.sum(-1, keepdims=True) + 16
    return x.reshape(ROWS, -1, 2)[..., ::-1].reshape(ROWS, WIDTH)
