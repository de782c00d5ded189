"""What nvcc makes of the kernels, without a GPU: registers, spills, instructions per code.

This is the part of `leankv bench --static`. It needs nvcc and cuobjdump, which need no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leankv_mlx.codec.format import TILE, Format
from leankv_mlx.errors import UnsupportedError
from leankv_mlx.kernels.gpu.attention import SPLITS
from leankv_mlx.kernels.gpu.launch import (
    CUBIC,
    SHUFFLE,
    TABLE,
    Kernel,
    Template,
    format_template,
)

# What MLX 0.32 puts around the text of a `cuda_kernel`, as far as it matters to the compiler.
_BEFORE = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cstdint>
#include <cuda/std/array>
using Shape = cuda::std::array<int32_t, 8>;
"""
STRATEGIES = {"cubic": CUBIC, "shuffle": SHUFFLE, "table": TABLE}


@dataclass(frozen=True)
class Resources:
    """What the assembler says about a kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Loop:
    """An innermost loop: all its instructions, and the fused multiply-adds among them.

    Attributes:
        parts: the same two of what lies between its branches, in order.
    """

    instructions: int
    multiply_adds: int
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the report. `bytes` is what a token of a KV head takes, and what is read of it.
    `scores` and `values` are instructions per decoded code and thread, the multiply-adds for all
    query heads included; None without cuobjdump, and where there is no loop of its own."""

    format: str
    head_dim: int
    group: int
    strategy: str
    bytes: int
    resources: Resources
    scores: float | None
    values: float | None


def cuda_source(kernel: Kernel, template: Template, types: Mapping[str, str]) -> str:
    """The text that MLX hands to the CUDA compiler for these integers and types of arrays."""
    parameters = []
    for name in (*kernel.inputs, *kernel.outputs):
        const = "const " if name in kernel.inputs else ""
        parameters.append(f"    {const}{types[name]}* {name}")
        if f"{name}_shape" in kernel.body:
            parameters.append(f"    const __grid_constant__ Shape {name}_shape")
    constants = (
        f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};\n"
        for name, value in ((name, template[name]) for name in kernel.template)
    )
    return (
        f"{_BEFORE}{kernel.header}\nnamespace mlx::core::cu {{\n__global__ void {kernel.name}(\n"
        + ",\n".join(parameters)
        + f") {{\n{''.join(constants)}{kernel.body}}}\n}}\n"
    )


def nvcc() -> str | None:
    """The CUDA compiler, in the path or where CUDA installs it."""
    return _tool("nvcc")


def cuobjdump() -> str | None:
    """The tool that prints machine code; it calls nvdisasm, which has to be found as well."""
    return _tool("cuobjdump")


def _tool(name: str) -> str | None:
    """In the path, where CUDA installs itself, or from NVIDIA's packages on PyPI."""
    places = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    spec = importlib.util.find_spec("nvidia")
    for package in spec.submodule_search_locations or () if spec else ():
        places += sorted(Path(package).glob("cu*/bin"), reverse=True)
    return shutil.which(name) or next(
        (str(place / name) for place in places if (place / name).is_file()), None
    )


def compile_cuda(source: str, target: Path, arch: str = "sm_90") -> Resources:
    """Compile to machine code at `target`.

    Raises:
        UnsupportedError: there is no nvcc.
        RuntimeError: it does not compile.
    """
    compiler = nvcc()
    if compiler is None:
        raise UnsupportedError("nvcc is not here; install the CUDA toolkit.")
    text = target.with_suffix(".cu")
    text.write_text(source)
    done = subprocess.run(
        [compiler, "-cubin", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", str(text), "-o",
         str(target)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr[-3000:]}")
    return _resources(done.stderr)


def _resources(log: str) -> Resources:
    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, log))

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill (?:stores|loads)"),
        number(r"(\d+) bytes smem"),
    )


def inner_loops(cubin: Path) -> list[Loop] | None:
    """The innermost loops of the one kernel in a file, in order; None without cuobjdump."""
    tool = cuobjdump()
    if tool is None:
        return None
    path = os.pathsep.join((str(Path(tool).parent), os.environ.get("PATH", "")))
    done = subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    return loops_of(done.stdout) if done.returncode == 0 and "/*0000*/" in done.stdout else None


def loops_of(sass: str) -> list[Loop]:
    """The innermost loops in a listing: backward branches with no other one inside."""
    code: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code.append((int(match[1], 16), match[2]))
    spans = []
    for at, text in code:
        if match := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text):
            target = int(match[1], 16)
            if target < at:
                spans.append((target, at))
    inner = [
        (first, last)
        for first, last in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    loops = []
    for first, last in inner:
        parts = [[0, 0]]
        for text in (text for at, text in code if first <= at <= last):
            parts[-1][0] += 1
            parts[-1][1] += "FFMA" in text
            if "BRA" in text:
                parts.append([0, 0])
        total, adds = (sum(part[i] for part in parts) for i in (0, 1))
        loops.append(Loop(total, adds, tuple((part[0], part[1]) for part in parts[:-1])))
    return loops


def attention_template(
    format: Format, group: int, strategy: int, blocks: int = 2, simd_groups: int = 8
) -> Template:
    """Decode attention of one new token with everything in it."""
    return {
        **format_template(format),
        "BLOCK": format.k_dim & -format.k_dim,
        "S": strategy,
        "R": group,
        "T": blocks,
        "NSG": simd_groups,
        "BODY": True,
        "EXACT": True,
        "CAUSAL": False,
    }


ATTENTION_TYPES = {
    "queries": "__half", "signs": "float", "scale": "float", "pool": "uint32_t",
    "table": "int32_t", "lengths": "int32_t", "mu_k": "float", "mu_v": "float", "keys": "__half",
    "values": "__half", "part": "float",
}  # fmt: skip


def attention_row(
    format: Format, group: int, strategy: str, blocks: int = 2, arch: str = "sm_90"
) -> Row:
    """Compile decode attention of a format and read the result."""
    template = attention_template(format, group, STRATEGIES[strategy], blocks)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "attention.cubin")
        resources = compile_cuda(cuda_source(SPLITS, template, ATTENTION_TYPES), target, arch)
        loops = inner_loops(target)
    scores, values = per_code(loops, format, group, blocks) if loops else (None, None)
    name = f"k{_text(format.k_bits)}v{_text(format.v_bits)}"
    return Row(
        name, format.k_dim, group, strategy, format.words * 4 // TILE, resources, scores, values
    )


def _text(bits: tuple[int, ...]) -> str:
    return str(bits[0]) if len({*bits}) == 1 else ".".join(map(str, bits))


def per_code(
    loops: Sequence[Loop], format: Format, group: int, blocks: int
) -> tuple[float | None, float | None]:
    """Instructions per code of the two loops that do the work, of a format that stores its first
    key groups and all value groups in as many bits each.

    The loop over channel groups decodes a key tile of each of `blocks` blocks, 32 codes a thread;
    the loop over words decodes those of all value groups. They are the first two with enough
    multiply-adds. A format that mixes bits has no such two loops, and one key group is no loop.
    """
    if len({*format.k_bits} - {0}) != 1 or len({*format.v_bits}) != 1:
        return None, None
    step = {2: 16, 3: 16, 4: 8, 8: 4}[format.v_bits[0]]
    codes = 32 * blocks, step * len(format.v_bits)
    found: list[float | None] = []
    rest = list(loops)
    for n in codes:
        at = next(
            (i for i, loop in enumerate(rest)
             if n * group <= loop.multiply_adds < n * (group + 2) + 8),
            None,
        )  # fmt: skip
        found.append(None if at is None else rest[at].instructions / n)
        rest = rest[at + 1 :] if at is not None else rest
    return found[0], found[1]


def report(arch: str = "sm_90") -> list[Row]:
    """Four query heads, head_dim 128, the formats and strategies of interest; then heads of which a
    mask keeps 3, 2 or 1 of 4 groups of key channels.

    Raises:
        UnsupportedError: there is no nvcc.
    """
    uniform = ((4, 4), (4, 3), (3, 3), (2, 2), (8, 8))
    formats = [Format.of(k_bits, v_bits, 128, 128) for k_bits, v_bits in uniform]
    formats += [Format((4,) * kept + (0,) * (4 - kept), (4,) * 4) for kept in (3, 2, 1)]
    return [
        attention_row(format, 4, strategy, arch=arch)
        for format in formats
        for strategy in ("shuffle", "cubic")
    ]
