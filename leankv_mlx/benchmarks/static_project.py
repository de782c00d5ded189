"""What nvcc makes of the products with quantized weights, and the bytes that they read.

This is the other part of `leankv bench --static`; see `benchmarks.static`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leankv_mlx.benchmarks.static import Loop, Resources, compile_cuda, cuda_source, inner_loops
from leankv_mlx.kernels.gpu.launch import Kernel, Template
from leankv_mlx.kernels.gpu.project import Spread, project_kernel, spread


@dataclass(frozen=True)
class ProjectRow:
    """A line of the report: a weight of 4096 inputs and many outputs.

    Attributes:
        instructions: for a weight, of one thread, the multiply-adds of all rows included: with all
            input channels, and with half of every 32; None without cuobjdump.
        bytes: of codes, scales and zeros that are read for a weight, as above.
    """

    bits: int
    group: int
    rows: int
    resources: Resources
    instructions: tuple[float | None, float | None]
    bytes: tuple[float, float]


def template(bits: int, group: int, way: Spread) -> Template:
    """One weight after a norm, with a bias, a residual and a threshold."""
    return {
        "B": bits,
        "QUADS": True,
        "GROUP": group,
        "R": way.rows,
        "L": way.words,
        "V": way.words_of_lane,
        "NSG": way.simd_groups,
        "NORM": True,
        "KEEP": 1,
        "BIASED": 1,
        "GATE": 0,
        "RESIDUAL": True,
    }


def types(kernel: Kernel, dtype: str = "__half") -> dict[str, str]:
    """Types of the arrays for a model of `dtype`."""
    fixed = {"sizes": "int32_t", "read": "int32_t", "columns": "float", "numbers": "float"}
    names = (*kernel.inputs, *kernel.outputs)
    codes = {name: "uint32_t" for name in names if name.startswith("codes")}
    return dict.fromkeys(names, dtype) | fixed | codes


def bytes_per_weight(bits: int, group: int, kept: float, side: int = 2) -> float:
    """Read from memory, with a share of the input channels kept and `side` bytes a scale. A strip's
    codes of a channel are whole sectors of 32 bytes, so none is read in vain."""
    return kept * 4 / (32 // bits) + 2 * side / group


def instructions_per_weight(
    loops: Sequence[Loop], bits: int, group: int, way: Spread, kept: float
) -> float | None:
    """Of the loop over 32 input channels: a step adds the products of a few channels, and is left
    out where no channel is left; the end of a group makes outputs of the products."""
    codes = way.words_of_lane * (32 // bits)
    steps = way.words // way.words_of_lane
    for loop in loops:
        step = [n for n, adds in loop.parts if adds == codes * way.rows]
        end = [n for n, adds in loop.parts if adds == 3 * codes * way.rows]
        if len(step) == steps and len(end) == 1:
            always = loop.instructions - sum(step) - end[0]
            return (always + kept * sum(step) + end[0] * 32 / group) / (steps * codes)
    return None


def project_row(bits: int, group: int, rows: int, arch: str = "sm_90") -> ProjectRow:
    """Compile a product and read the result."""
    way = spread(rows, 4096 // group, bits, tiles=500)
    kernel = project_kernel(1, gated=False, keep=True)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "project.cubin")
        source = cuda_source(kernel, template(bits, group, way), types(kernel))
        resources = compile_cuda(source, target, arch)
        loops = inner_loops(target) or []
    all_kept, half = (
        (
            instructions_per_weight(loops, bits, group, way, kept),
            bytes_per_weight(bits, group, kept),
        )
        for kept in (1.0, 0.5)
    )
    both = all_kept[0], half[0]
    return ProjectRow(bits, group, rows, resources, both, (all_kept[1], half[1]))


def project_report(arch: str = "sm_90") -> list[ProjectRow]:
    """The formats of interest.

    Raises:
        UnsupportedError: there is no nvcc.
    """
    kinds = ((4, 64, 1), (4, 32, 1), (4, 64, 4), (3, 64, 1), (2, 64, 1), (8, 64, 1))
    return [project_row(*kind, arch=arch) for kind in kinds]
