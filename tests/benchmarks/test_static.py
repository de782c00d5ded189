"""The kernels through nvcc, and what the report reads from its result."""

from __future__ import annotations

from pathlib import Path

import pytest

from leankv_mlx.benchmarks import static
from leankv_mlx.codec.format import Format
from leankv_mlx.errors import UnsupportedError
from leankv_mlx.kernels.gpu.append import APPEND
from leankv_mlx.kernels.gpu.attention import SKIPPING, SPLITS, merge_kernel
from leankv_mlx.kernels.gpu.dequantize import DEQUANTIZE
from leankv_mlx.kernels.gpu.encode import ENCODE
from leankv_mlx.kernels.gpu.launch import Kernel, Template, format_template
from leankv_mlx.kernels.gpu.repack import REPACK

with_nvcc = pytest.mark.skipif(static.nvcc() is None, reason="needs nvcc")
HALF, BFLOAT = "__half", "__nv_bfloat16"
UNIFORM = Format((4,) * 4, (3,) * 4)
MIXED = Format((4, 0, 3, 8), (2, 8, 0, 3, 4, 4))
BLOCKS = {"KF": 0, **format_template(MIXED), "NSG": 8, "SEARCH": True}
INDEX = {"pool": "uint32_t", "table": "int32_t", "lengths": "int32_t", "slots": "int32_t"}
CENTERS = {"mu_k": "float", "mu_v": "float"}
PARTS = {f"part{i}": "float" for i in range(3)}

KERNELS: list[tuple[str, Kernel, Template, dict[str, str]]] = [
    (
        f"attention-{name}-{strategy}",
        SPLITS,
        static.attention_template(format, group, number),
        static.ATTENTION_TYPES | {"queries": dtype, "keys": dtype, "values": dtype},
    )
    for name, format, group, dtype in (("uniform", UNIFORM, 4, HALF), ("mixed", MIXED, 3, BFLOAT))
    for strategy, number in static.STRATEGIES.items()
] + [
    (
        "attention-exact-only",
        SPLITS,
        static.attention_template(UNIFORM, 1, 0) | {"BODY": False, "BLOCK": 0, "CAUSAL": True},
        static.ATTENTION_TYPES | {"queries": "float"},
    ),
    (
        "attention-skip",
        SKIPPING,
        static.attention_template(MIXED, 4, 1),
        static.ATTENTION_TYPES | {"log_skip": "float", "reads": "int32_t"},
    ),
    (
        "merge",
        merge_kernel(3),
        {"VC": 5, "BLOCK": 32, "TOKENS": 2, "HEAD_DIM": 150, "SINK": True},
        PARTS | {"sink_logits": HALF, "signs": "float", "out": BFLOAT, "lse": "float"},
    ),
    ("encode", ENCODE, BLOCKS, CENTERS | {"keys": HALF, "values": BFLOAT, "blocks": "uint32_t"}),
    ("dequantize", DEQUANTIZE, BLOCKS, INDEX | CENTERS | {"keys": BFLOAT, "values": BFLOAT}),
    ("repack", REPACK, BLOCKS, INDEX | {"blocks": "uint32_t"}),
    (
        "append",
        APPEND,
        {"KC": 4, "VC": 6, "BLOCK_K": 128, "BLOCK_V": 64, "OLD": True, "ROWS": 4},
        {name: HALF for name in APPEND.inputs + APPEND.outputs}
        | {"signs_k": "float", "signs_v": "float"},
    ),
]
ALIKE = ("attention-mixed-cubic", "attention-mixed-table", "attention-uniform-shuffle")
"""Both formats and all strategies are in the others."""


@with_nvcc
@pytest.mark.parametrize(
    ("kernel", "template", "types"),
    [
        pytest.param(*rest, marks=[pytest.mark.slow] * (name in ALIKE), id=name)
        for name, *rest in KERNELS
    ],
)
def test_every_kernel_compiles_without_spills(
    kernel: Kernel, template: Template, types: dict[str, str], tmp_path: Path
) -> None:
    source = static.cuda_source(kernel, template, types)
    assert static.compile_cuda(source, tmp_path / "k.cubin").spilled_bytes == 0


@with_nvcc
def test_decoding_takes_few_instructions() -> None:
    """The best strategies of a feasibility study took 7.7 and 7.5, multiply-adds included."""
    row = static.attention_row(Format.of(4, 4, 128, 128), 4, "shuffle")
    assert row.resources.spilled_bytes == 0
    if row.scores is None or row.values is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    assert row.scores <= 7.7 and row.values <= 7.5


@pytest.mark.slow
@with_nvcc
def test_the_whole_report() -> None:
    rows = static.report()
    assert all(row.resources.spilled_bytes == 0 for row in rows)
    assert len({(row.format, row.strategy) for row in rows}) == len(rows) == 10


def test_without_nvcc_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(static, "nvcc", lambda: None)
    with pytest.raises(UnsupportedError, match="install the CUDA toolkit"):
        static.compile_cuda("", tmp_path / "k.cubin")


def test_loops_are_read_from_a_listing() -> None:
    lines = ["MOV R1, R2", "FFMA R1, R2, R3, R4", "IADD R1", "@P0 BRA 0x10", "NOP", "@P1 BRA 0x0",
             "BRA 0x100"]  # fmt: skip
    listing = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))
    assert static.loops_of(listing) == [static.Loop(instructions=3, multiply_adds=1)]
