"""`leankv bench`: speed of kernels and whole steps, beside mlx-lm's own caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leankv_mlx.cli.console import console, show
from leankv_mlx.cli.reading import LastJson
from leankv_mlx.errors import UsageError
from leankv_mlx.terminal import say_json

if TYPE_CHECKING:
    from leankv_mlx.benchmarks.settings import Settings
    from leankv_mlx.evaluation.tables import Grid


_Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Part to run: attention, steps, prefill, encode, skip, masks, policy or "
        "projections; repeat for more.",
        show_default="all",
    ),
]
_Kv = Annotated[
    list[str] | None,
    typer.Option(
        help="Setting, such as k4v4; repeat to compare.",
        show_default="k4v4, and k3v2 for attention",
    ),
]
_Tokens = Annotated[
    str | None,
    typer.Option(help="Contexts of all parts, such as 512,4096.", show_default="per part"),
]
_Heads = Annotated[
    list[str] | None,
    typer.Option(
        help="Query heads x KV heads x head_dim of attention; repeat for more.",
        show_default="32x8x128, 4x1x128, 4x1x256",
    ),
]
_Shape = Annotated[
    str | None,
    typer.Option(
        help="Model of the other parts, with random weights; -8l leaves 8 layers.",
        show_default="qwen3-0.6b-8l",
    ),
]
_Backend = Annotated[str, typer.Option(help="Whose kernels.")]
_Fast = Annotated[bool, typer.Option("--fast", help="Small settings: two minutes on two cores.")]
_Static = Annotated[
    bool, typer.Option("--static", help="Instead, what nvcc makes of the CUDA kernels.")
]
_Ui = Annotated[
    bool, typer.Option("--ui", help="Instead, first paint and frame rate of the chat app.")
]
_Documents = Annotated[
    bool,
    typer.Option("--documents", help="Instead, the second question about a document."),
]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Instead, prefill, decode and fidelity of a real model: folder, hub id or GGUF file.",
    ),
]
_Peer = Annotated[
    Path | None,
    typer.Option(
        help="The same beside ik_llama.cpp on this GGUF file, which is also the default of --model."
    ),
]
_PeerPython = Annotated[
    str | None,
    typer.Option(
        envvar="LEANKV_PEER_PYTHON",
        help="The interpreter that has ik-llama-cpp-python.",
        show_default="this one",
    ),
]
_Text = Annotated[
    Path | None, typer.Option(help="Text file for --model (default: generated text).")
]
_Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens per chunk for the fidelity of --model; half are scored.", show_default="1024"
    ),
]
_Chunks = Annotated[int | None, typer.Option(help="Chunks of them.", show_default="4")]
_Rounds = Annotated[
    int | None,
    typer.Option(help="Turns of each cache with --model and --serving.", show_default="3"),
]
_Serving = Annotated[
    bool,
    typer.Option(
        "--serving",
        help="Instead, many requests at once, with and without a limit of KV bytes, and on one "
        "document.",
    ),
]
_Requests = Annotated[
    int | None, typer.Option(help="How many of --serving, of --tokens each.", show_default="16")
]
_Generate = Annotated[
    int | None, typer.Option(help="Tokens of each reply of --serving.", show_default="64")
]
_Question = Annotated[
    int | None,
    typer.Option(help="Tokens behind the one document of --serving.", show_default="32"),
]
_Fits = Annotated[
    int | None,
    typer.Option(
        help="Uncompressed sequences that the limit of --serving has room for.", show_default="4"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("bench")(bench)


def bench(
    only: _Only = None,
    kv: _Kv = None,
    tokens: _Tokens = None,
    heads: _Heads = None,
    shape: _Shape = None,
    backend: _Backend = "auto",
    fast: _Fast = False,
    static: _Static = False,
    ui: _Ui = False,
    documents: _Documents = False,
    model: _Model = None,
    peer: _Peer = None,
    peer_python: _PeerPython = None,
    text: _Text = None,
    context: _Context = None,
    chunks: _Chunks = None,
    rounds: _Rounds = None,
    serving: _Serving = False,
    requests: _Requests = None,
    generate: _Generate = None,
    question: _Question = None,
    fits: _Fits = None,
    as_json: LastJson = False,
) -> None:
    """Measure speed: medians and ratios of interleaved runs."""
    common = _given(model=model, kv=tuple(kv or ()), text=text, rounds=rounds)
    if serving:
        own = _given(requests=requests, generate=generate, question=question, fits=fits)
        if tokens is not None:
            own["tokens"] = _one(tokens)
        _serve(common | own, fast, as_json)
        return
    contexts = () if tokens is None else _tokens(tokens)
    if model is not None or peer is not None:
        own = _given(
            peer=peer, peer_python=peer_python, tokens=contexts, context=context, chunks=chunks
        )
        _real(common | own, as_json)
        return
    if static or ui or documents:
        _instead(static, ui, documents, as_json)
        return
    from leankv_mlx.benchmarks.settings import FAST, FULL
    from leankv_mlx.benchmarks.shapes import Heads

    own = _given(
        only=tuple(part.strip().lower() for part in only or ()),
        kv=tuple(kv or ()),
        heads=tuple(map(Heads.parse, heads or ())),
        shape=shape,
    )
    settings = replace(FAST if fast else FULL, backend=backend, **own)
    _measure(settings.with_tokens(contexts) if contexts else settings, as_json)


def _given(**options: Any) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _tokens(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--tokens {text} is not understood; use for example 512,4096.") from None


def _one(text: str) -> int:
    found = _tokens(text)
    if len(found) != 1:
        raise UsageError(f"--tokens {text} with --serving is one number, for example 2048.")
    return found[0]


def _measure(settings: Settings, as_json: bool) -> None:
    from leankv_mlx.benchmarks.suite import run
    from leankv_mlx.benchmarks.tables import tables

    with console(stderr=True).status("") as status:
        report = run(settings, lambda what: status.update(f"{what} ..."))
    show(tables(report), f"{report.machine}; backend {report.backend}", to_stderr=as_json)
    if as_json:
        say_json(report.as_dict(), indent=None)


def _real(given: dict[str, Any], as_json: bool) -> None:
    """Measure a real model."""
    from leankv_mlx.benchmarks.real import RealSettings, run_real
    from leankv_mlx.benchmarks.tables import real_tables

    settings = RealSettings(**given)
    with console(stderr=True).status("") as status:
        report = run_real(settings, lambda what: status.update(f"{what} ..."))
    title = f"{report.machine}; {report.peer}" if report.peer else report.machine
    show(real_tables(report), title, to_stderr=as_json)
    if as_json:
        say_json(report.as_dict(), indent=None)


def _serve(given: dict[str, Any], fast: bool, as_json: bool) -> None:
    """Measure many requests at once."""
    from leankv_mlx.benchmarks.serving import FAST, ServingSettings, run_serving
    from leankv_mlx.benchmarks.tables import serving_tables

    settings = replace(FAST if fast else ServingSettings(), **given)
    with console(stderr=True).status("") as status:
        report = run_serving(settings, lambda what: status.update(f"{what} ..."))
    show(serving_tables(report), report.machine, to_stderr=as_json)
    if as_json:
        say_json(report.as_dict(), indent=None)


def _instead(static: bool, ui: bool, documents: bool, as_json: bool) -> None:
    """The reports that are no comparison."""
    from leankv_mlx.benchmarks.static import report
    from leankv_mlx.benchmarks.static_project import project_report
    from leankv_mlx.benchmarks.suite import machine
    from leankv_mlx.benchmarks.tables import figures_table, project_table, static_table

    document: dict[str, Any] = {"machine": machine()}
    grids: list[Grid] = []
    if static:
        rows = report()
        document["static"] = [asdict(row) for row in rows]
        products = project_report()
        document["static_products"] = [asdict(row) for row in products]
        grids += [static_table(rows), project_table(products)]
    if ui:
        # By name: the package does not depend on the app, which comes with it.
        measure_ui: Callable[[], dict[str, Any]] = import_module("leankv_app.bench").measure_ui
        document["ui"] = measure_ui()
        grids.append(figures_table("Chat app", document["ui"]))
    if documents:
        from leankv_mlx.benchmarks.documents import measure_documents

        document["documents"] = measure_documents()
        grids.append(figures_table("Documents", document["documents"]))
    show(grids, document["machine"], to_stderr=as_json)
    if as_json:
        say_json(document, indent=None)
