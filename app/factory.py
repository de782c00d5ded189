"""Making the app: the command line and the tests use the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from leankv_app.options import Options
from leankv_app.paths import Paths
from leankv_mlx.config import UNCOMPRESSED, kv_text, parse_kv
from leankv_mlx.engine.requests import Emit, EngineLike
from leankv_mlx.errors import ConfigError, DocumentError, UsageError
from leankv_mlx.profiles import profiles

if TYPE_CHECKING:
    from leankv_app.app import ChatApp

MakeEngine = Callable[[Emit], EngineLike]


def full_kv(text: str, stored: bool = False) -> str:
    """A `--kv` text from what users write: a profile's name and a bare SPEC are enough.

    Args:
        stored: the text was kept by an earlier run, see `CompressionConfig.parse`.

    Raises:
        ConfigError: it is not understood.
    """
    return kv_text(parse_kv(text, stored))


def kv_choices() -> list[str]:
    """What the picker and the completion offer."""
    try:
        return [*profiles(), UNCOMPRESSED]
    except ConfigError:  # the user's file is damaged, which is said where one of them is used
        return [UNCOMPRESSED]


def check(options: Options) -> None:
    """Find bad usage before the screen is taken.

    Raises:
        UsageError: an option makes no sense.
    """
    from leankv_mlx.documents.readers import check_source

    if options.kv is not None:
        full_kv(options.kv)
    if options.replay is not None:
        from leankv_mlx.engine.record import read

        read(options.replay)
    if options.replay_speed < 0:
        raise UsageError("--replay-speed is 0 or more.")
    if options.resume and options.resume != "last" and not options.resume.isdigit():
        raise UsageError(f"--resume {options.resume} is not a session; use its number, or last.")
    for file in options.files:
        try:
            check_source(file)
        except DocumentError as error:
            raise UsageError(str(error)) from error


def engine_maker(options: Options) -> MakeEngine:
    """The engine that the options ask for."""
    if options.replay is None:
        from leankv_mlx.engine.engine import Engine

        return Engine
    from leankv_mlx.engine.record import ReplayEngine, read

    events = read(options.replay)
    return lambda emit: ReplayEngine(events, emit, options.replay_speed)


def make_app(options: Options, paths: Paths, make_engine: MakeEngine | None = None) -> ChatApp:
    """The app, ready to run; the engine starts after the first paint."""
    from leankv_app.app import ChatApp

    return ChatApp(options, paths, make_engine or engine_maker(options))
