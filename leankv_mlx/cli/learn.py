"""`leankv learn`: masks of key channels, which of them a model's cache keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leankv_mlx.cli.console import show as show_tables
from leankv_mlx.cli.eval import progress_bar
from leankv_mlx.cli.reading import LastJson
from leankv_mlx.resources import demo_model
from leankv_mlx.terminal import say_json

if TYPE_CHECKING:
    from leankv_mlx.evaluation.masks import Look

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
        help="Masks of key channels, learned for a model: what codes keep of its keys.",
        no_args_is_help=True,
        add_completion=False,
    )
    group.command("show")(show)
    app.add_typer(group, name="learn")


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
    from leankv_mlx.settings import Mask

    masks = load(name)
    if model is None and masks.model != fingerprint(demo_model()):
        return look(name, masks)
    path = resolve_model(model)
    masks = find(fingerprint(path), path.name, Mask(name))
    with progress_bar() as progress:
        loaded = load_model(path)
        progress.start(work(masks))
        return measured(loaded, name, masks, lambda what: progress.advance(what, 1))
