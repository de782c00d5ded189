"""The Metal source that MLX generates for a kernel, and the C++ that the harness compiles.

MLX prints the source of a kernel when it is traced, which `mx.export_function` does without a
device. So what is tested is the text that a Mac compiles, argument list included.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.kernels.gpu.launch import Grid, Kernel, Output, Template

_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{\n", re.S)
_INSTANCE = re.compile(
    r'\ntemplate \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*?;\s*$', re.S
)
_PARAMETER = re.compile(
    r"\s*(.*?)\s*\b(\w+)\s*\[\[(\w+)(?:\((\d+)\))?(?:, function_constant\(\w+\))?\]\]\s*$", re.S
)

_ENTRY = """
#line 1 "entry"
extern "C" char __start_msltg[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_msltg[] __attribute__((weak, visibility("hidden")));
extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));
#define MSL_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))
MSL_UNCHECKED static void msl_entry(void* const* a, const msl_position& p) {{
  {call};
}}
extern "C" MSL_UNCHECKED void msl_library(void** library) {{
  library[0] = (void*)msl_entry;
  library[1] = __start_msltg;
  library[2] = __stop_msltg;
  library[3] = __ehdr_start;
  library[4] = _end;
}}
"""


@dataclass(frozen=True)
class Source:
    """C++ text, and the names of its buffers in the order of their numbers."""

    cpp: str
    buffers: tuple[str, ...]


def generate(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    template: Template,
    grid: Grid,
    threadgroup: Grid,
    outputs: Sequence[Output],
) -> str:
    """The Metal source of a call, from MLX."""
    call = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body,
        header=kernel.header,
    )

    def traced(*arrays: mx.array) -> list[mx.array]:
        result: list[mx.array] = call(
            inputs=list(arrays),
            template=[(name, template[name]) for name in kernel.template],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            verbose=True,
        )
        return result

    with tempfile.TemporaryDirectory() as folder:
        text = _printed(lambda: mx.export_function(f"{folder}/f.mlxfn", traced, *inputs))
    return text[text.index("```\n") + 4 : text.rindex("\n```")]


def _printed(run: object) -> str:
    """What C++ code prints to the standard output."""
    assert callable(run)
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            run()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        return file.read().decode()


def to_cpp(metal: str, prelude: str = "", function: str = "", types: str = "") -> Source:
    """Add an entry that the runtime calls. The Metal text itself stays as it is.

    Args:
        metal: one kernel, with its instance if it is a template.
        prelude: text in front of it.
        function: the instance, if it is not in the text.
        types: declarations of what the instance puts in for the names of types.
    """
    instance = _INSTANCE.search(metal)
    text = metal[: instance.start()] if instance else metal
    signature = _SIGNATURE.search(text)
    assert signature, "no kernel in the source"
    buffers: dict[int, str] = {}
    arguments = []
    for parameter in signature[2].split(",\n"):
        match = _PARAMETER.match(parameter)
        assert match, parameter
        type_, name, attribute, number = match.groups()
        if attribute == "buffer":
            buffers[int(number)] = name
            arguments.append(_buffer(type_, int(number)))
        elif type_ == "uint3":
            arguments.append(f"uint3(p.{attribute}[0], p.{attribute}[1], p.{attribute}[2])")
        else:
            arguments.append(f"p.{attribute}")
    function = function or (instance[1] if instance else signature[1])
    entry = types + _ENTRY.format(call=f"{function}({', '.join(arguments)})")
    cpp = f'#line 1 "prelude"\n{prelude}\n#line 1 "kernel.metal"\n{text}\n{entry}'
    return Source(cpp, tuple(buffers.get(i, "") for i in range(max(buffers) + 1)))


def _buffer(type_: str, number: int) -> str:
    if type_.endswith("&"):
        return f"*({type_[:-1]}*)a[{number}]"
    return f"({type_})a[{number}]"


def line_of(source: Source, line: int) -> str:
    """A line of the kernel, for messages."""
    text = source.cpp.split('#line 1 "kernel.metal"\n', 1)[1].split("\n")
    return text[line - 1].strip() if 0 < line <= len(text) else ""
