"""The products of a decode step and of a prefill with quantized weights, and nothing else of them:
ours beside MLX's own quantized products and dense float32 weights.

All layers of a model are one evaluation, each with the products that a step has: Q, K and V, the
output of attention (here Q stands for it), gate and up, down. The head is measured by itself.
Weights are random, so what is left out are the smallest of normal numbers; down and the output of
attention keep everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import mlx.core as mx
from mlx import nn

from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.shapes import Shape, shape_of
from leankv_mlx.benchmarks.timing import Arm, interleave
from leankv_mlx.kernels.cpu import load
from leankv_mlx.projections import Keep, Norm, Weight, project, relay, resolve_backend

ROWS = (1, 4)
SHARES = (1.0, 0.75, 0.5)
"""Input channels that take part, with one row."""
PREFILL_ROWS = 512

OURS, MLX, DENSE, BOUND = "ours", "mlx", "dense fp32", "bound"
BITS, HEAD_BITS, GROUP = 4, 8, 32
"""Of the layers and of the head: what a Q4_1 file has."""

_BOUND_PRODUCTS = 50_000_000
_EPS = 1e-5


@dataclass(frozen=True)
class Matrix:
    """One weight [N, K] in each of the forms that are compared."""

    own: Weight
    codes: tuple[mx.array, mx.array, mx.array]
    dense: mx.array

    @classmethod
    def random(cls, outputs: int, inputs: int, bits: int) -> Matrix:
        """With float16 scales, as a file has them."""
        values = (mx.random.normal((outputs, inputs)) * inputs**-0.5).astype(mx.float16)
        codes, scales, biases = mx.quantize(values, GROUP, bits)
        own = relay(codes, scales, biases, GROUP, bits)
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        dense = mx.dequantize(codes, scales, biases, GROUP, bits)
        mx.eval(own.codes, own.scales, own.biases, codes, scales, biases, dense)
        return cls(own, (codes, scales, biases), dense)

    @property
    def products(self) -> int:
        """Multiply-adds with one row."""
        return self.dense.size

    def mlx(self, x: mx.array) -> mx.array:
        """x by its transpose, with MLX's quantized product."""
        bits = 32 * self.codes[0].shape[1] // self.dense.shape[1]
        return mx.quantized_matmul(x, *self.codes, transpose=True, group_size=GROUP, bits=bits)


Product = Callable[[Matrix, mx.array], mx.array]


@dataclass(frozen=True)
class Layer:
    """The weights of a layer, in the order in which a step meets them."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix

    @classmethod
    def random(cls, shape: Shape) -> Layer:
        """Of a model."""
        q, kv = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, wide = shape.hidden, shape.intermediate
        sizes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
        sizes += [(wide, hidden), (wide, hidden), (hidden, wide)]
        return cls(*(Matrix.random(*size, BITS) for size in sizes))

    def ours(self, x: mx.array, norm: Norm, keep: Keep | None) -> list[mx.array]:
        """x [R, hidden] -> keys, values, the next x."""
        q, k, v = project(x, [self.q.own, self.k.own, self.v.own], norm=norm, keep=keep).outs
        x = project(q, [self.o.own], residual=x).outs[0]
        pair = [self.gate.own, self.up.own]
        h = project(x, pair, norm=norm, keep=keep, gate="silu").outs[0]
        return [k, v, project(h, [self.down.own], residual=x).outs[0]]

    def with_product(self, x: mx.array, norm: Norm, product: Product) -> list[mx.array]:
        """The same one by one, as a model computes it."""
        normed = mx.fast.rms_norm(x, norm.weight, norm.eps)
        q, k, v = (product(matrix, normed) for matrix in (self.q, self.k, self.v))
        x = x + product(self.o, q)
        normed = mx.fast.rms_norm(x, norm.weight, norm.eps)
        h = nn.silu(product(self.gate, normed)) * product(self.up, normed)
        return [k, v, x + product(self.down, h)]


def measure_projections(settings: Settings, advance: Advance) -> list[Row]:
    """A row for each of models x parts x rows x shares."""
    found = []
    for name in settings.projections:
        shape = shape_of(name)
        layers = [Layer.random(shape) for _ in range(shape.layers)]
        for rows in ROWS:
            for share in SHARES if rows == 1 else SHARES[:1]:
                advance(f"projections, {name}, {rows} rows, {share:.0%} of the channels")
                found.append(_layers(settings, shape, layers, rows, share))
        advance(f"projections, {name}, {PREFILL_ROWS} rows")
        found.append(_layers(settings, shape, layers[:1], PREFILL_ROWS, 1.0))
        del layers
        advance(f"projections, {name}, its head")
        found.append(_head(settings, shape))
        mx.clear_cache()
    return found


def _layers(
    settings: Settings, shape: Shape, layers: Sequence[Layer], rows: int, share: float
) -> Row:
    x = mx.random.normal((rows, shape.hidden))
    norm = Norm(mx.ones((shape.hidden,)), _EPS)
    keep = None if share == 1 else Keep(NormalDist().inv_cdf(1 - share / 2))

    def chain(step: Callable[[Layer, mx.array], list[mx.array]]) -> Callable[[], object]:
        def run() -> None:
            outs, out = [], x
            for layer in layers:
                *others, out = step(layer, out)
                outs += others
            mx.eval(outs, out)

        return run

    arms = {
        OURS: chain(lambda layer, x: layer.ours(x, norm, keep)),
        MLX: chain(lambda layer, x: layer.with_product(x, norm, Matrix.mlx)),
        DENSE: chain(lambda layer, x: layer.with_product(x, norm, lambda m, x: x @ m.dense.T)),
    }
    matrices = [matrix for layer in layers for matrix in vars(layer).values()]
    head = {"shape": shape.name, "part": f"{len(layers)} layers", "rows": rows, "share": share}
    return head | _measured(settings, arms, matrices, rows)


def _head(settings: Settings, shape: Shape) -> Row:
    matrix = Matrix.random(shape.vocab, shape.hidden, HEAD_BITS)
    x, norm = mx.random.normal((1, shape.hidden)), Norm(mx.ones((shape.hidden,)), _EPS)

    def normed() -> mx.array:
        return mx.fast.rms_norm(x, norm.weight, norm.eps)

    arms: dict[str, Arm] = {
        OURS: lambda: mx.eval(project(x, [matrix.own], norm=norm).outs),
        MLX: lambda: mx.eval(matrix.mlx(normed())),
        DENSE: lambda: mx.eval(normed() @ matrix.dense.T),
    }
    head = {"shape": shape.name, "part": "head", "rows": 1, "share": 1.0}
    return head | _measured(settings, arms, [matrix], 1)


def _measured(
    settings: Settings, arms: Mapping[str, Arm], matrices: Sequence[Matrix], rows: int
) -> Row:
    native = resolve_backend().name == "cpu"
    rates: list[float] = []
    if native:
        arms = {
            **arms,
            BOUND: lambda: rates.append(load().multiply_add_rate(_BOUND_PRODUCTS)),
        }
    timings = interleave(arms, settings.budget)
    nbytes = sum(matrix.own.nbytes for matrix in matrices)
    products = rows * sum(matrix.products for matrix in matrices)
    row = compared(timings, OURS, [MLX, DENSE])
    row |= {"backend": resolve_backend().name, "bytes": nbytes, "products": products}
    if native:
        row["bound_share"] = 1e3 * products / statistics.median(rates) / row["ms"]
    return row
