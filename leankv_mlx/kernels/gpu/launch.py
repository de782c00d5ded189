"""What a kernel is, and who launches it.

Functions lie in metal/ and are the header of a kernel; its body here is thin, because MLX looks
for thread attributes and `<input>_shape` in the body only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx

from leankv_mlx.codec.channels import reordered
from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import Hadamard, Ordered
from leankv_mlx.kernels.gpu.geometry import Geometry, Shape, Tuner
from leankv_mlx.kernels.types import Rotations
from leankv_mlx.resources import metal_sources

CUBIC, SHUFFLE, TABLE = range(3)
"""Strategies from code to value: LKV_CUBIC, LKV_SHUFFLE and LKV_TABLE of metal/values.metal."""

Template = dict[str, int | bool]
Grid = tuple[int, int, int]
Output = tuple[tuple[int, ...], mx.Dtype]

MAX_GROUPS = 8
"""Channel groups of a format that the kernels know: head_dim up to 256. Beyond that the operations
run as plain MLX ops."""
_BITS = (0, 2, 3, 4, 8)


@dataclass(frozen=True)
class Kernel:
    """A kernel body, and the files of metal/ that it needs, compat.h not named.

    Attributes:
        inputs: names of the arrays. All are made row contiguous.
        template: names of the integers that the body is compiled for.
    """

    name: str
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    template: tuple[str, ...]
    body: str

    @property
    def header(self) -> str:
        """Text that stands in front of the kernel."""
        return "\n".join(_text(name) for name in ("compat.h", *self.files))


class Launcher(Protocol):
    """Compiles and runs kernels; both grids count threads."""

    strategy: int
    """From code to value; see the top of this file."""

    def geometry(self, shape: Shape) -> Geometry:
        """How decode attention of a shape is spread."""

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Template,
        grid: Grid,
        threadgroup: Grid,
        outputs: Sequence[Output],
    ) -> list[mx.array]: ...


@dataclass
class MlxLauncher:
    """Launches through `mx.fast.metal_kernel` or `mx.fast.cuda_kernel`."""

    compile: Callable[..., Any]
    strategy: int
    tuner: Tuner
    _compiled: dict[str, Any] = field(default_factory=dict)

    def geometry(self, shape: Shape) -> Geometry:
        """See `Launcher`."""
        return self.tuner.choose(shape)

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Template,
        grid: Grid,
        threadgroup: Grid,
        outputs: Sequence[Output],
    ) -> list[mx.array]:
        """See `Launcher`."""
        run = self._compiled.get(kernel.name)
        if run is None:
            run = self._compiled[kernel.name] = self.compile(
                name=kernel.name,
                input_names=list(kernel.inputs),
                output_names=list(kernel.outputs),
                source=kernel.body,
                header=kernel.header,
            )
        result: list[mx.array] = run(
            inputs=list(inputs),
            template=[(name, template[name]) for name in kernel.template],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return result


def side_code(bits: tuple[int, ...]) -> int:
    """Bits of each channel group as the integer that metal/layout.metal reads."""
    return sum(_BITS.index(b) << (3 * c) for c, b in enumerate(bits))


def format_template(format: Format) -> Template:
    """KF, VF, KC and VC of a format."""
    return {
        "KF": side_code(format.k_bits),
        "VF": side_code(format.v_bits),
        "KC": len(format.k_bits),
        "VC": len(format.v_bits),
    }


def hadamards(rotations: Rotations | None) -> tuple[Hadamard, Hadamard] | None:
    """Rotations, if they are those that the kernels know, the channels of the keys in order."""
    k, v = rotations or (None, None)
    k = k.rotation if isinstance(k, Ordered) else k
    return (k, v) if isinstance(k, Hadamard) and isinstance(v, Hadamard) else None


def in_order(x: mx.array, rotations: Rotations | None) -> mx.array:
    """Keys or queries [.., n * H, L, head_dim] as `hadamards` takes them."""
    k = rotations[0] if rotations else None
    return reordered(x, k.channels.forth) if isinstance(k, Ordered) else x


@lru_cache
def constant(value: float) -> mx.array:
    """A number as an array [1]: kernels take no scalars."""
    return mx.array([value], mx.float32)


@lru_cache
def nothing(dtype: mx.Dtype) -> mx.array:
    """Stands for an array that a kernel does not read; large enough to lie in device memory."""
    zeros = mx.zeros((1, 1, 32), dtype)
    mx.eval(zeros)  # a lazy array would belong to the thread that came first
    return zeros


@lru_cache
def _text(name: str) -> str:
    return (metal_sources() / name).read_text()
