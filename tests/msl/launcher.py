"""The backend `msl-check`: the GPU backend, its kernels run on the CPU under the checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.kernels.gpu.geometry import Geometry, Shape
from leankv_mlx.kernels.gpu.launch import CUBIC, SHUFFLE, TABLE, Grid, Kernel, Output, Template
from tests.msl import compiler, lint
from tests.msl.dispatch import Run, dispatch
from tests.msl.source import Source, generate, to_cpp

DTYPES: dict[mx.Dtype, Any] = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.uint32: np.uint32,
    mx.int32: np.int32,
}
"""NumPy has no bfloat16: its bits travel as uint16."""


NAMES = "typedef half float16_t; typedef bfloat bfloat16_t;"
"""What MLX's own prelude declares and a generated signature uses; see test_prelude.py."""
STRATEGIES = (CUBIC, SHUFFLE, TABLE)

CHECKED = Run()
SPREAD = Geometry(2, 2, 1)

_SOURCES: dict[Any, str] = {}


class ReportError(AssertionError):
    """The checker found something."""


def unchanged(text: str) -> str:
    return text


def _metal(kernel: Kernel, inputs: Sequence[mx.array], template: Template, *call: Any) -> str:
    """The Metal source of a call, which has passed the lint; made once for equal signatures."""
    # MLX's text depends on no more of an array than this.
    kinds = [(x.dtype, x.size < 8, x.ndim == 0) for x in inputs]
    outputs = [dtype for _, dtype in call[-1]]
    key = repr((kernel, template, kinds, outputs))
    if key not in _SOURCES:
        metal = generate(kernel, inputs, template, *call)
        if problems := lint.check(metal):
            raise compiler.CompileError("\n".join(problems))
        _SOURCES[key] = metal
    return _SOURCES[key]


@dataclass
class MslLauncher:
    """Runs kernels in the harness; see `kernels.gpu.launch.Launcher`.

    Attributes:
        strategy: from code to value.
        run: in which order, and what is checked.
        spread: how decode attention is spread.
        edit: changes the source first, to plant a bug.
        prelude: text in front of the source.
        flags: which C++ it is.
    """

    strategy: int = CUBIC
    run: Run = CHECKED
    spread: Geometry = SPREAD
    edit: Callable[[str], str] = unchanged
    prelude: str = NAMES
    flags: tuple[str, ...] = compiler.METAL_CXX

    def geometry(self, shape: Shape) -> Geometry:
        """See `Launcher`."""
        return self.spread

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Template,
        grid: Grid,
        threadgroup: Grid,
        outputs: Sequence[Output],
    ) -> list[mx.array]:
        """Evaluates at once.

        Raises:
            ReportError: a race, an access out of bounds, ...
            CompileError: the kernel does not compile.
        """
        arrays = [mx.contiguous(x) for x in inputs]
        source = self.source(kernel, arrays, template, grid, threadgroup, outputs)
        run = self.run
        library = compiler.build_kernel(source.cpp, check=run.check, flags=self.flags)
        result = dispatch(
            library,
            source,
            self._buffers(kernel, arrays),
            {
                name: (shape, DTYPES[dtype])
                for name, (shape, dtype) in zip(kernel.outputs, outputs, strict=True)
            },
            grid,
            threadgroup,
            run,
        )
        if result.reports:
            raise ReportError(f"{kernel.name} {template}:\n{result.reports}")
        return [
            from_numpy(result.outputs[name], dtype)
            for name, (_, dtype) in zip(kernel.outputs, outputs, strict=True)
        ]

    def source(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Template,
        grid: Grid,
        threadgroup: Grid,
        outputs: Sequence[Output],
    ) -> Source:
        """The C++ of a call; the Metal text has passed the lint."""
        metal = _metal(kernel, inputs, template, grid, threadgroup, outputs)
        return to_cpp(self.edit(metal), self.prelude)

    def _buffers(self, kernel: Kernel, arrays: Sequence[mx.array]) -> dict[str, NDArray[Any]]:
        """Arrays and their shapes, under the names that MLX gives them."""
        buffers = {}
        for name, array in zip(kernel.inputs, arrays, strict=True):
            buffers[name] = to_numpy(array)
            buffers[f"{name}_shape"] = np.array(array.shape, np.int32)
        return buffers


class MixedLauncher(MslLauncher):
    """What a parity matrix runs on: every shape has its own strategy, order of threads and spread,
    chosen by the shape alone, so that a test always repeats itself."""

    def geometry(self, shape: Shape) -> Geometry:
        """1 to 7 splits, 1 to 4 SIMD groups, 1 or 2 blocks at a time."""
        number = shape.heads * 5 + shape.head_dim // 32 * 3 + shape.slots
        self.strategy = STRATEGIES[number % 3]
        self.run = Run(order=number // 3 % 3, seed=number, jitter=number % 5)
        return Geometry(1 + number % 7, (1, 2, 3, 4)[number % 4], 1 + number // 2 % 2)


def to_numpy(array: mx.array) -> NDArray[Any]:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: NDArray[Any], dtype: mx.Dtype) -> mx.array:
    whole = mx.array(array.copy())
    return whole.view(mx.bfloat16) if dtype == mx.bfloat16 else whole
