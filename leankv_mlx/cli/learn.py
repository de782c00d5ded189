"""`leankv learn`: masks of key channels and bases of keys, of one model each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from leankv_mlx.cli.console import console
from leankv_mlx.cli.console import show as show_tables
from leankv_mlx.cli.eval import progress_bar
from leankv_mlx.cli.reading import LastJson
from leankv_mlx.errors import UsageError
from leankv_mlx.resources import demo_model
from leankv_mlx.terminal import note, say, say_json

if TYPE_CHECKING:
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.lab import Progress
    from leankv_mlx.evaluation.masks import Look

_LINES = 20
"""That tell how far it is, where there is no bar."""

_Learner = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Folder, GGUF file or hub id of a model.",
        show_default="the bundled model",
    ),
]
_Output = Annotated[str, typer.Option("--output", "-o", help="What to call it, and its profile.")]
_Ratio = Annotated[float, typer.Option(help="Share of the key channels that is left out.")]
_Text = Annotated[
    Path | None,
    typer.Option(
        help="Text that the model is to go on with as before, of the kind that it will read.",
        show_default="generated text",
    ),
]
_Tokens = Annotated[int, typer.Option(help="Tokens of the longest document to learn from.")]
_Documents = Annotated[int, typer.Option(help="Documents to learn from, with questions.")]
_Steps = Annotated[int, typer.Option(help="Steps of learning.")]
_Excerpts = Annotated[int, typer.Option("--documents", help="Texts to learn from.")]
_ExcerptTokens = Annotated[int, typer.Option("--tokens", help="Tokens of each text.")]
_ExcerptText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Text that parts are drawn from, of the kind that the model will read.",
        show_default="generated text",
    ),
]
_Seed = Annotated[int, typer.Option(help="Of what is drawn: the same seed gives the same result.")]
_By = Annotated[
    str,
    typer.Option(
        help="What channels are worth: learned, or without learning, to compare with: keys (their "
        "size), queries-keys (the size of both), random."
    ),
]
_Name = Annotated[str, typer.Argument(help="Name of the mask, as in mask=NAME.")]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Its model (folder, GGUF file or hub id), to see also how large queries and keys are "
        "and which heads retrieve.",
        show_default="none; the bundled model for a mask of it",
    ),
]
_Plot = Annotated[
    Path | None, typer.Option(help="Write a picture (.svg or .png); needs the extra plot.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    group = typer.Typer(
        help="What is learned of a model's keys: masks of channels, and rotations.",
        no_args_is_help=True,
        add_completion=False,
    )
    group.command("masks")(masks)
    group.command("rotations")(rotations)
    group.command("show")(show)
    app.add_typer(group, name="learn")


def masks(
    model: _Learner = None,
    output: _Output = "",
    ratio: _Ratio = 0.6,
    text: _Text = None,
    tokens: _Tokens = 2048,
    documents: _Documents = 24,
    steps: _Steps = 200,
    seed: _Seed = 0,
    by: _By = "learned",
) -> None:
    """Learn which key channels a model can do without, and write a mask and a profile that has it.

    A run that was stopped goes on when the same command is given again.
    """
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.fidelity import read_text
    from leankv_mlx.learning.course import taught
    from leankv_mlx.learning.lessons import Material
    from leankv_mlx.learning.masks import Course
    from leankv_mlx.learning.sizes import By
    from leankv_mlx.settings import Named

    _check_output("mask", output)
    if by not in get_args(By):
        raise UsageError(f"--by {by} is unknown; use one of {', '.join(get_args(By))}.")
    course = Course(ratio, steps)
    material = Material(documents, tokens, seed, None if text is None else read_text(text))
    with _progress() as progress:
        found, path = taught(model, output, course, material, progress, cast("By", by))
    named = Named(output, found.digest)
    say(f"wrote mask {named} to {path}")
    how = "learned on" if by == "learned" else f"by {by}, for"
    about = f"{how} {found.name}: leaves out {ratio:.0%} of the key channels"
    _save(output, replace(CompressionConfig(), mask=named), about)
    say(f"measure it with leankv eval --kv {output}, look at it with leankv learn show {output}")


def rotations(
    model: _Learner = None,
    output: _Output = "",
    text: _ExcerptText = None,
    tokens: _ExcerptTokens = 4096,
    documents: _Excerpts = 4,
    seed: _Seed = 0,
) -> None:
    """Learn in which basis a model's keys lose least, and write that and two profiles that have it,
    NAME with 3 bits and NAME-tiny with 2.

    The texts are read once, and what matters in them is counted; no step is trained.
    """
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.evaluation.fidelity import read_text
    from leankv_mlx.learning.basis import taught
    from leankv_mlx.learning.lessons import Material
    from leankv_mlx.settings import Named

    _check_output("basis", output)
    material = Material(documents, tokens, seed, None if text is None else read_text(text))
    with _progress() as progress:
        found, path = taught(model, output, material, progress)
    named = Named(output, found.digest)
    say(f"wrote basis {named} to {path}")
    for name, bits in ((output, 3), (f"{output}-tiny", 2)):
        kv = CompressionConfig(k_bits=bits, v_bits=bits, window=32, basis=named)
        _save(name, kv, f"{bits} bits, keys in a basis learned on {found.name}")
    say(f"measure them with leankv eval --kv {output} --kv {output}-tiny")


def _check_output(what: str, output: str) -> None:
    """What would otherwise be told after an hour.

    Raises:
        UsageError: nothing can be called so.
        ConfigError: the file of profiles is damaged.
    """
    from leankv_mlx.profiles import check_name, profiles

    if not output:
        raise UsageError(f"give the {what} a name: -o NAME.")
    check_name(output)
    profiles()


def _save(name: str, config: CompressionConfig, about: str) -> None:
    """Write a profile, and say so."""
    from leankv_mlx.profiles import save_profile, user_profiles

    save_profile(user_profiles(), name, config.spec().removeprefix("leankv:"), about)
    say(f"wrote profile {name} to {user_profiles()}: {config.spec()}")


def show(name: _Name, model: _Model = None, plot: _Plot = None, as_json: LastJson = False) -> None:
    """Show what a mask keeps, by head and by frequency; with its model, which heads retrieve."""
    from leankv_mlx.evaluation.lab import machine
    from leankv_mlx.evaluation.mask_plot import plot_look
    from leankv_mlx.evaluation.masks import tables
    from leankv_mlx.evaluation.plot import check_plot

    if plot is not None:
        check_plot(plot)
    found = _look(name, model)
    if plot is not None:
        plot_look(found, plot)
    show_tables(tables(found), machine(), to_stderr=as_json)
    if as_json:
        say_json(found.as_dict(), indent=None)


def _look(name: str, model: str | None) -> Look:
    """Of a mask, with the model if there is one.

    Raises:
        CalibrationError: there is no such mask, or it is of another model.
        ModelError: the model cannot be found or loaded.
    """
    from leankv_mlx.cache.masks import find, load
    from leankv_mlx.evaluation.masks import look, measured, work
    from leankv_mlx.mlx_lm.loading import fingerprint, resolve_model
    from leankv_mlx.mlx_lm.loading import load as load_model
    from leankv_mlx.settings import Named

    masks = load(name)
    if model is None and masks.model != fingerprint(demo_model()):
        return look(name, masks)
    path = resolve_model(model)
    masks = find(fingerprint(path), path.name, Named(name))
    with progress_bar() as progress:
        loaded = load_model(path)
        progress.start(work(masks))
        return measured(loaded, name, masks, lambda what: progress.advance(what, 1))


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar; where there is no terminal for one, a line now and then, because it takes an hour."""
    if console(stderr=True).is_terminal:
        with progress_bar() as progress:
            yield progress
        return
    from leankv_mlx.evaluation import lab

    begin, total, done, told = time.monotonic(), 1, 0, 0

    def start(work: int) -> None:
        nonlocal total
        total = max(1, work)

    def advance(what: str, tokens: int) -> None:
        nonlocal done, told
        done += tokens
        share = done / total
        if _LINES * share >= told + 1:
            told = int(_LINES * share)
            left = (time.monotonic() - begin) * (1 - share) / share
            note(f"{share:.0%}, {what}, about {left / 60:.0f} minutes left")

    yield lab.Progress(start, advance)
