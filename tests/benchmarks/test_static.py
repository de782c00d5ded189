"""The kernels through nvcc, and what the report reads from its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leankv_mlx.benchmarks import static, static_project
from leankv_mlx.codec.format import Format
from leankv_mlx.errors import UnsupportedError
from leankv_mlx.kernels.gpu.append import MAX_SEQUENCES, append_kernel
from leankv_mlx.kernels.gpu.attention import SKIPPING, SPLITS, attention_kernel, merge_kernel
from leankv_mlx.kernels.gpu.dequantize import DEQUANTIZE
from leankv_mlx.kernels.gpu.encode import ENCODE
from leankv_mlx.kernels.gpu.launch import Kernel, Template, format_template
from leankv_mlx.kernels.gpu.project import UNPACK, Spread, project_kernel, spread
from leankv_mlx.kernels.gpu.repack import REPACK

with_nvcc = pytest.mark.skipif(static.nvcc() is None, reason="needs nvcc")
HALF, BFLOAT = "__half", "__nv_bfloat16"
UNIFORM = Format((4,) * 4, (3,) * 4)
MIXED = Format((4, 0, 3, 8), (2, 8, 0, 3, 4, 4))
BLOCKS = {"KF": 0, **format_template(MIXED), "NSG": 8, "SEARCH": True}
INDEX = {"pool": "uint32_t", "table": "int32_t", "lengths": "int32_t", "slots": "int32_t"}
CENTERS = {"mu_k": "float", "mu_v": "float"}
PARTS = {f"part{i}": "float" for i in range(3)}
POOLS = {"places": "int32_t"} | {f"pool{i}": "uint32_t" for i in range(8)}


def append(sequences: int) -> Any:
    """A row of KERNELS."""
    kernel = append_kernel(sequences)
    template = {"KC": 4, "VC": 6, "BLOCK_K": 128, "BLOCK_V": 64, "OLD": 1, "ROWS": 4}
    types = dict.fromkeys(kernel.inputs + kernel.outputs, HALF)
    return f"append-{sequences}", kernel, template, types | {"signs_k": "float", "signs_v": "float"}


def product(count: int, gated: bool, keep: int, bits: int, rows: int, tiles: int) -> Any:
    """A row of KERNELS."""
    kernel = project_kernel(count, gated=gated, keep=keep > 0)
    way = spread(rows, 64, bits, tiles)
    template = static_project.template(bits, 64, way)
    more = {"KEEP": keep, "GATE": 2 if gated else 0, "BIASED": 3, "QUADS": tiles > 1}
    name = f"product-{count}-{bits}-{rows}"
    return name, kernel, template | more, static_project.types(kernel, BFLOAT if gated else HALF)


ENCODED = CENTERS | {"keys": HALF, "values": BFLOAT, "shaping": "float", "blocks": "uint32_t"}
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
        "attention-batch",
        attention_kernel(8),
        static.attention_template(UNIFORM, 4, 1),
        static.ATTENTION_TYPES | POOLS,
    ),
    (
        "attention-batch-skip",
        attention_kernel(1, skip=True),
        static.attention_template(MIXED, 4, 0),
        static.ATTENTION_TYPES | POOLS | {"log_skip": "float", "reads": "int32_t"},
    ),
    (
        "merge",
        merge_kernel(3),
        {"VC": 5, "BLOCK": 32, "TOKENS": 2, "HEAD_DIM": 150, "SINK": True},
        PARTS | {"sink_logits": HALF, "signs": "float", "out": BFLOAT, "lse": "float"},
    ),
    *(
        (name, ENCODE, BLOCKS | {"SHAPED": shaped}, ENCODED)
        for name, shaped in (("encode", False), ("encode-shaped", True))
    ),
    ("dequantize", DEQUANTIZE, BLOCKS, INDEX | CENTERS | {"keys": BFLOAT, "values": BFLOAT}),
    ("repack", REPACK, BLOCKS, INDEX | {"blocks": "uint32_t"}),
    append(1),
    append(MAX_SEQUENCES),
    product(1, False, 1, 4, 1, 500),
    product(3, False, 2, 3, 3, 1),
    product(2, True, 1, 4, 2, 500),
    product(1, False, 1, 2, 8, 500),
    (
        "unpack",
        UNPACK,
        {"B": 5, "QUADS": True, "GROUP": 32},
        {"codes": "uint32_t", "scales": HALF, "zeros": HALF, "sizes": "int32_t", "dense": BFLOAT},
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
    resources = static.compile_cuda(source, tmp_path / "k.cubin")
    assert resources.spilled_bytes == 0
    if kernel.name.startswith("leankv_project"):  # a multiprocessor has 65,536 registers
        assert -(-resources.registers // 8) * 8 * 32 * int(template["NSG"]) <= 65536


@with_nvcc
def test_decoding_takes_few_instructions() -> None:
    """The best strategies of a feasibility study took 7.7 and 7.5, multiply-adds included."""
    row = static.attention_row(Format.of(4, 4, 128, 128), 4, "shuffle")
    assert row.resources.spilled_bytes == 0
    if row.scores is None or row.values is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    assert row.scores <= 7.7 and row.values <= 7.5


@with_nvcc
def test_a_mask_of_channels_costs_no_instructions() -> None:
    """What is left of the keys is decoded as if all were."""
    whole = static.attention_row(Format.of(4, 4, 128, 128), 4, "shuffle")
    some = static.attention_row(Format((4, 4, 0, 0), (4,) * 4), 4, "shuffle")
    assert (some.format, some.bytes, whole.bytes) == ("k4.4.0.0v4", 100, 132)
    assert some.resources.spilled_bytes == 0
    assert some.resources.registers <= whole.resources.registers
    if some.scores is None or whole.scores is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    assert some.scores <= whole.scores + 0.1


@with_nvcc
def test_half_of_the_channels_are_half_of_the_codes_and_fewer_instructions() -> None:
    row = static_project.project_row(4, 64, 1)
    assert row.resources.spilled_bytes == 0
    assert row.bytes == (0.5 + 4 / 64, 0.25 + 4 / 64)
    whole, half = row.instructions
    if whole is None or half is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    assert whole < 4.7 and half < 3.2


def test_instructions_are_counted_by_what_they_are_for() -> None:
    way = Spread(rows=1, words=16, words_of_lane=2, simd_groups=8)
    parts = ((100, 0), *[(50, 16)] * 8, (140, 48))
    loops = [static.Loop(9, 1), static.Loop(640, 176, parts)]
    counted = [static_project.instructions_per_weight(loops, 4, 64, way, kept) for kept in (1, 0.5)]
    assert counted == [(100 + 400 + 70) / 128, (100 + 200 + 70) / 128]
    assert static_project.instructions_per_weight(loops[:1], 4, 64, way, 1) is None


@pytest.mark.slow
@with_nvcc
def test_the_whole_report() -> None:
    rows = static.report()
    assert all(row.resources.spilled_bytes == 0 for row in rows)
    assert len({(row.format, row.strategy) for row in rows}) == len(rows) == 16
    assert all(row.resources.spilled_bytes == 0 for row in static_project.project_report())


def test_without_nvcc_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(static, "nvcc", lambda: None)
    with pytest.raises(UnsupportedError, match="install the CUDA toolkit"):
        static.compile_cuda("", tmp_path / "k.cubin")


def test_loops_are_read_from_a_listing() -> None:
    lines = ["MOV R1, R2", "FFMA R1, R2, R3, R4", "IADD R1", "@P0 BRA 0x10", "NOP", "@P1 BRA 0x0",
             "BRA 0x100"]  # fmt: skip
    listing = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))
    loop = static.Loop(instructions=3, multiply_adds=1, parts=((3, 1),))
    assert static.loops_of(listing) == [loop]
