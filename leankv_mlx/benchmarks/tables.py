"""A report as tables of text, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from leankv_mlx.benchmarks import static, static_project
from leankv_mlx.benchmarks.fill import DTYPES, STOCK
from leankv_mlx.benchmarks.masks import WHOLE
from leankv_mlx.benchmarks.projections import DENSE, MLX
from leankv_mlx.benchmarks.real import RealReport
from leankv_mlx.benchmarks.serving import ServingReport
from leankv_mlx.benchmarks.settings import Row
from leankv_mlx.benchmarks.skip import NONE
from leankv_mlx.benchmarks.suite import Report
from leankv_mlx.evaluation.tables import Grid

_BASELINES = (*DTYPES, *STOCK)
_Column = tuple[str, Callable[[Row], str]]


def tables(report: Report) -> list[Grid]:
    """Every table that the report has something for."""
    grids = []
    if report.attention:
        grids.append(_attention(report.attention))
    for title, rows, columns, note in (
        ("Decode steps", report.steps, _STEPS, _STEPS_NOTE),
        ("Prefill", report.prefill, _PREFILL, "needs: bytes beyond weights and caches, at most"),
        ("Encoding", report.encode, _ENCODE, _ENCODE_NOTE),
        ("Attention with skip", report.skip, _SKIP, _SKIP_NOTE),
    ):
        for shape, of_shape in groupby(rows, lambda row: row["shape"]):
            grids.append(_grid(f"{title}, {shape}", list(of_shape), columns, note))
    if report.masks:
        title = "Attention with masks of key channels"
        grids.append(_plain(title, report.masks, _MASKS, _MASKS_NOTE))
    if report.policy:
        title = f"Policies, {report.policy[0]['shape']}"
        grids.append(_plain(title, report.policy, _POLICY, _POLICY_NOTE))
    if report.projections:
        grids.append(_plain("Projections", report.projections, _PROJECTIONS, _PROJECTIONS_NOTE))
    return grids


def _grid(title: str, rows: Sequence[Row], columns: Sequence[_Column], note: str) -> Grid:
    used = [base for base in _BASELINES if any(base in row["baseline_ms"] for row in rows)]
    at = next(i for i, (name, _) in enumerate(columns) if name == "ms") + 1
    baselines = [(base, _baseline(base)) for base in used]
    return _plain(title, rows, [*columns[:at], *baselines, *columns[at:]], note)


def _plain(title: str, rows: Sequence[Row], columns: Sequence[_Column], note: str) -> Grid:
    header = [name for name, _ in columns]
    return Grid(title, header, [[text(row) for _, text in columns] for row in rows], note)


def _attention(rows: Sequence[Row]) -> Grid:
    columns: list[_Column] = [
        ("heads", _heads),
        ("tokens", lambda row: f"{row['tokens']}"),
        ("format", lambda row: row["format"]),
        ("ms", lambda row: _ms(row["ms"])),
        ("speedup", lambda row: _times(row["speedup"])),
    ]
    note = "milliseconds; speedup: the fastest of the others over ours"
    if any("bound_share" in row for row in rows):
        columns += [
            ("of bound", lambda row: f"{row['bound_share']:.0%}" if "bound_share" in row else ""),
            (
                "threads",
                lambda row: _times(row["thread_speedup"]) if "thread_speedup" in row else "",
            ),
        ]
        note += (
            "; of bound: of the multiply-adds that the processor could do in that time; threads: "
            "one thread's time over that of all"
        )
    return _grid("Decode attention", rows, columns, note)


def _heads(row: Row) -> str:
    return f"{row['query_heads']}x{row['kv_heads']}x{row['head_dim']}"


def _baseline(name: str) -> Callable[[Row], str]:
    return lambda row: _ms(row["baseline_ms"][name]) if name in row["baseline_ms"] else ""


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _mb(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


_FIRST: tuple[_Column, ...] = (
    ("tokens", lambda row: f"{row['tokens']}"),
    ("dtype", lambda row: row["dtype"]),
    ("format", lambda row: row["format"]),
)
_STEPS: tuple[_Column, ...] = (
    *_FIRST,
    ("ms", lambda row: _ms(row["ms"])),
    ("tokens/s", lambda row: f"{1e3 / row['ms']:.1f}"),
    ("same dtype", lambda row: _times(row["ratios"][row["dtype"]])),
    ("speedup", lambda row: _times(row["speedup"])),
    ("KV", lambda row: _mb(row["kv_bytes"])),
    ("uncompressed KV", lambda row: _mb(row["baseline_kv_bytes"][row["dtype"]])),
)
_STEPS_NOTE = (
    "milliseconds, random weights; same dtype: median ratio of the uncompressed cache in that "
    "dtype to ours; speedup: the fastest of the others over ours"
)
_PREFILL: tuple[_Column, ...] = (
    *_FIRST,
    ("ms", lambda row: _ms(row["ms"])),
    ("tokens/s", lambda row: f"{1e3 * row['tokens'] / row['ms']:.1f}"),
    ("ours / uncompressed", lambda row: f"{1 / row['ratios'][row['dtype']]:.3f}"),
    ("needs", lambda row: _mb(row["working_bytes"])),
    ("uncompressed needs", lambda row: _mb(row["baseline_working_bytes"][row["dtype"]])),
)
_ENCODE: tuple[_Column, ...] = (
    *_FIRST,
    ("ms", lambda row: f"{row['ms']:.3f}"),
    ("step ms", lambda row: _ms(row["baseline_ms"]["step"])),
    ("share of a step", lambda row: f"{row['share']:.2%}"),
)
_ENCODE_NOTE = "ms: encoding a block of 32 tokens in every layer, by token"
_SKIP: tuple[_Column, ...] = (
    ("tokens", lambda row: f"{row['tokens']}"),
    ("attention", lambda row: row["data"]),
    ("format", lambda row: row["format"]),
    ("skip", lambda row: f"{row['skip']:g}"),
    ("ms", lambda row: _ms(row["ms"])),
    (NONE, lambda row: _ms(row["baseline_ms"][NONE])),
    ("ours / no skip", lambda row: f"{1 / row['ratios'][NONE]:.3f}"),
    ("values read", lambda row: f"{row['read']:.1%}"),
    ("output error", lambda row: f"{row['error']:.2%}"),
)
_SKIP_NOTE = (
    "ms: all layers, by decode step; attention: of a text that the model read, repeated beyond its "
    "length, or uniform; output error: relative to attention without skip, mean"
)


_MASKS: tuple[_Column, ...] = (
    ("heads", _heads),
    ("tokens", lambda row: f"{row['tokens']}"),
    ("format", lambda row: row["format"]),
    ("dropped", lambda row: f"{row['ratio']:.0%}"),
    ("empty heads", lambda row: f"{row['empty_heads']:.0%}"),
    ("K bytes", lambda row: f"{row['k_bytes']:.1%}"),
    ("V bytes", lambda row: f"{row['v_bytes']:.1%}"),
    ("bytes", lambda row: f"{row['bytes']:.1%}"),
    ("time", lambda row: f"{1 / row['ratios'][WHOLE]:.1%}"),
    ("ms", lambda row: _ms(row["ms"])),
    (WHOLE, lambda row: _ms(row["baseline_ms"][WHOLE])),
)
_MASKS_NOTE = (
    "which groups of 32 key channels are dropped is drawn; empty: of heads of which none is kept; "
    "bytes of codes, and time of attention, of those with all channels; milliseconds by layer"
)


_POLICY: tuple[_Column, ...] = (
    ("tokens", lambda row: f"{row['tokens']}"),
    ("settings", lambda row: row["format"]),
    ("prompt ms", lambda row: _ms(row["prompt_ms"])),
    ("its end ms", lambda row: _ms(row["end_ms"])),
    ("share", lambda row: f"{row['prompt_share']:.2%}"),
    ("step ms", lambda row: _ms(row["step_ms"])),
    ("flush ms", lambda row: f"{row['flush_ms']:.3f}"),
    ("share", lambda row: f"{row['decode_share']:.2%}"),
    ("ratio", lambda row: _times(row["ratio"])),
)
_POLICY_NOTE = (
    "its end: judging and placing all tokens once the prompt is in; flush: judging, encoding and "
    "placing the tokens that leave the window, by generated token; random weights"
)


_PROJECTIONS: tuple[_Column, ...] = (
    ("model", lambda row: row["shape"]),
    ("weights of", lambda row: row["part"]),
    ("rows", lambda row: f"{row['rows']}"),
    ("channels", lambda row: f"{row['share']:.0%}"),
    ("ms", lambda row: _ms(row["ms"])),
    *((base, _baseline(base)) for base in (MLX, DENSE)),
    ("x mlx", lambda row: _times(row["ratios"][MLX])),
    ("x dense", lambda row: _times(row["ratios"][DENSE])),
    ("GB/s", lambda row: f"{row['bytes'] / row['ms'] / 1e6:.1f}"),
    ("of bound", lambda row: f"{row['bound_share']:.0%}" if "bound_share" in row else ""),
)
_PROJECTIONS_NOTE = (
    "milliseconds; x: median ratio to ours; GB/s: all bytes of the weights in our time, read or "
    "not; of bound: of the multiply-adds that the processor could do in that time, all channels "
    "counted"
)


_SPEED: tuple[_Column, ...] = (
    ("tokens", lambda row: f"{row['tokens']}"),
    ("program", lambda row: row["program"]),
    ("cache", lambda row: row["cache"]),
    ("prefill tokens/s", lambda row: f"{row['prefill_tokens_s']:.1f}"),
    ("", lambda row: _times(row["prefill_speedup"])),
    ("decode tokens/s", lambda row: f"{row['decode_tokens_s']:.1f}"),
    ("", lambda row: _times(row["decode_speedup"])),
    ("KV", lambda row: _mb(row["kv_bytes"])),
    ("rounds", lambda row: f"{row['rounds']}"),
)
_LOSS: tuple[_Column, ...] = (
    ("program", lambda row: row["program"]),
    ("cache", lambda row: row["cache"]),
    ("body bits", lambda row: f"{row['body_bits']:.2f}"),
    ("KLD mean", lambda row: f"{row['kld']['mean']:.5f} ±{row['kld_error']:.5f}"),
    ("p99", lambda row: f"{row['kld']['p99']:.5f}"),
    ("max", lambda row: f"{row['kld']['max']:.5f}"),
    ("top-1 %", lambda row: f"{100 * row['top1']:.1f} ±{100 * row['top1_error']:.1f}"),
    ("ppl", lambda row: f"{row['ppl']:.3f}"),
)


def real_tables(report: RealReport) -> list[Grid]:
    """Speed and fidelity of a real model."""
    note = (
        f"medians of interleaved rounds, {report.threads} threads; x: times as fast as "
        f"{report.speed[0]['reference']}, median over the rounds"
    )
    loss = "each program's caches beside its own uncompressed one, on the same tokens"
    return [
        _plain(f"Speed, {report.model}", report.speed, _SPEED, note),
        _plain(f"Fidelity, {report.model}", report.fidelity, _LOSS, loss),
    ]


_BATCHES: tuple[_Column, ...] = (
    ("KV limit", lambda row: _mb(row["limit_bytes"]) if row["limit_bytes"] else "none"),
    ("cache", lambda row: row["cache"]),
    ("at a time", lambda row: f"{row['at_a_time']}"),
    ("KV", lambda row: _mb(row["kv_bytes"])),
    ("prefill tokens/s", lambda row: f"{row['prefill_tokens_s']:.1f}"),
    ("", lambda row: _times(row["prefill_speedup"])),
    ("decode tokens/s", lambda row: f"{row['decode_tokens_s']:.1f}"),
    ("", lambda row: _times(row["decode_speedup"])),
    ("total tokens/s", lambda row: f"{row['total_tokens_s']:.2f}"),
    ("", lambda row: _times(row["total_speedup"])),
)
_DOCUMENT: tuple[_Column, ...] = (
    ("cache", lambda row: row["cache"]),
    ("first token", lambda row: f"{row['first_s']:.2f} s"),
    ("of the others", lambda row: f"{row['others_s']:.3f} s"),
    ("", lambda row: f"{row['others_share']:.1%}"),
    ("KV of one", lambda row: _mb(row["kv_bytes_one"])),
    ("of all", lambda row: _mb(row["kv_bytes"])),
    ("", lambda row: _times(row["kv_ratio"])),
)
_BATCHES_NOTE = (
    "x: times as fast as the uncompressed cache, medians of interleaved runs; total: generated "
    "tokens by the time of prompts and replies; what is not compressed counts two bytes an element"
)


def serving_tables(report: ServingReport) -> list[Grid]:
    """Requests at once, and on one document."""
    size = f"{report.requests} requests"
    each = f"{size} of {report.tokens} tokens, {report.generate} generated"
    shared = f"{size} on {report.document[0]['document_tokens']} tokens"
    note = "seconds to the first token, medians; bytes that sequences share count once"
    return [
        _plain(f"{each}, {report.model}", report.batches, _BATCHES, _BATCHES_NOTE),
        _plain(f"{shared}, {report.model}", report.document, _DOCUMENT, note),
    ]


def static_table(rows: Sequence[static.Row]) -> Grid:
    """What nvcc makes of the kernels."""
    header = ("kv", "head_dim", "group", "strategy", "bytes", "registers", "spilled", "shared",
              "per key code", "per value code")  # fmt: skip
    cells = [
        [
            row.format,
            f"{row.head_dim}",
            f"{row.group}",
            row.strategy,
            f"{row.bytes}",
            f"{row.resources.registers}",
            f"{row.resources.spilled_bytes} B",
            f"{row.resources.shared_bytes} B",
            *("?" if n is None else f"{n:.2f}" for n in (row.scores, row.values)),
        ]
        for row in rows
    ]
    note = (
        "bytes: read of a token of one KV head; instructions per code and thread, the "
        "multiply-adds of all query heads included, ? where they are no loop of their own"
    )
    if all(row.values is None for row in rows):
        note += "; ? needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump "
        note += "nvidia-cuda-nvdisasm"
    return Grid("Decode attention on CUDA, compiled and not run", header, cells, note)


def project_table(rows: Sequence[static_project.ProjectRow]) -> Grid:
    """What nvcc makes of the products with quantized weights."""
    header = ("bits", "group", "rows", "registers", "spilled", "instructions", "half kept", "bytes",
              "half kept")  # fmt: skip
    cells = [
        [
            f"{row.bits}",
            f"{row.group}",
            f"{row.rows}",
            f"{row.resources.registers}",
            f"{row.resources.spilled_bytes} B",
            *("?" if n is None else f"{n:.2f}" for n in row.instructions),
            *(f"{n:.3f}" for n in row.bytes),
        ]
        for row in rows
    ]
    note = "for a weight: instructions of a thread in the loop, all rows; bytes with 16-bit scales"
    return Grid("Products on CUDA, compiled and not run", header, cells, note)


def figures_table(title: str, found: Mapping[str, float | bool]) -> Grid:
    """Figures with their names."""
    cells = [
        [name.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)]
        for name, value in found.items()
    ]
    return Grid(title, ("figure", "value"), cells)
