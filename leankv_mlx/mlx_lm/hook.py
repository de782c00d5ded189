"""`--kv` for mlx-lm's own commands: what `leankv_mlx_hook.pth` calls when Python starts.

The line in the .pth file looks for `--kv`, `--prompt-cache-file` or `--help` beside `mlx_lm` in
the command line, and only then imports this module. `install` then waits for the command to read
its flags: at that moment everything it needs is imported, and the names in its module can be
replaced. Without `--kv` a command runs as it would without this package, except that its help names
the flag and that a compressed prompt cache file gets an answer. LEANKV_NO_HOOK=1 turns all of it
off.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import PurePath
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from leankv_mlx.blas import bind
from leankv_mlx.config import UNCOMPRESSED
from leankv_mlx.errors import LeanKVError, UsageError, error_line
from leankv_mlx.mlx_lm.flags import add_flags

COMMANDS = ("benchmark", "cache_prompt", "chat", "generate", "server")
REFUSED = {
    "evaluate": "it reads whole batches into one cache, which holds one sequence",
    "perplexity": "it runs the model without a cache",
}
"""Commands that `--kv` would not reach, and why."""

_PACKAGE = "mlx_lm"
_ACTIVE = ExitStack()
"""What `uninstall` undoes; closed and replaced by it."""

_installed = False


def command_of(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command of mlx-lm that a Python command line runs, and the command's own arguments.

    Args:
        argv: `sys.orig_argv`: `python .../mlx_lm.generate ...`, `python -m mlx_lm.generate ...`,
            `python -m mlx_lm generate ...` and `python .../mlx_lm generate ...` are understood.
    """
    rest = list(argv[1:])
    while rest and rest[0].startswith("-") and rest[0] != "-":
        flag, value = _flag_with_value(rest.pop(0))
        if not flag:
            continue
        if not value and rest:
            value = rest.pop(0)
        if flag == "m":
            return _split(value, rest)
        if flag == "c":
            return None, []
    return _split(PurePath(rest[0]).name, rest[1:]) if rest else (None, [])


def _flag_with_value(word: str) -> tuple[str, str]:
    """The flag of Python in a word like `-um` that takes a value, and the value in the word."""
    if word.startswith("--"):
        return ("check", "") if word == "--check-hash-based-pycs" else ("", "")
    for at, letter in enumerate(word[1:], start=2):
        if letter in "cmWX":
            return letter, word[at:]
    return "", ""


def _split(program: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    package, _, command = program.removesuffix(".exe").partition(".")
    if package != _PACKAGE:
        return None, []
    if not command:
        command = arguments.pop(0) if arguments else ""
    return command, arguments


def install() -> None:
    """Prepare for the command of this process; does nothing the second time."""
    global _installed
    if _installed or os.environ.get("LEANKV_NO_HOOK", "0") not in ("", "0"):
        return
    _installed = True
    command, arguments = command_of(sys.orig_argv)
    with_kv = any(word == "--kv" or word.startswith("--kv=") for word in arguments)
    with_file = any(word.startswith("--prompt-c") for word in arguments)  # may be abbreviated
    for_help = any(word == "-h" or word.startswith("--h") for word in arguments)
    if command in REFUSED and with_kv:
        finder = _Refusal(command)
        sys.meta_path.insert(0, finder)
        _ACTIVE.callback(sys.meta_path.remove, finder)
    elif command in COMMANDS and (with_kv or for_help or (with_file and command == "generate")):
        if with_kv:
            bind()  # Python has just started: mlx is not imported yet
        _wait_for_flags(command, with_kv)


def uninstall() -> None:
    """Restore everything that `install` and the command's start have replaced."""
    global _installed
    _installed = False
    _ACTIVE.close()


class _Refusal:
    """Stops the import of mlx-lm, because not every command of it gets as far as its flags."""

    def __init__(self, command: str) -> None:
        self.command = command

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == _PACKAGE:
            _leave(
                UsageError(
                    f"mlx_lm.{self.command} does not take --kv: {REFUSED[self.command]}; "
                    "drop --kv, or measure a compressed cache with leankv eval."
                )
            )


def _leave(error: LeanKVError) -> NoReturn:
    print(error_line(error), file=sys.stderr)
    raise SystemExit(error.exit_code)


def _wait_for_flags(command: str, with_kv: bool) -> None:
    """Stand in for `ArgumentParser.parse_args` until the command calls it."""
    original = argparse.ArgumentParser.parse_args
    waiting = ExitStack()

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        module = _running(command)
        if module is None:
            return original(parser, *args, **options)
        waiting.close()
        if not with_kv:
            add_flags(parser, UNCOMPRESSED)  # so that it is in the help
            return _checked(original(parser, *args, **options))
        run = _Run(module, command, parser)
        return run.guard(lambda: parser.parse_args(*args, **options))

    def restore() -> None:
        if argparse.ArgumentParser.parse_args is parse_args:
            argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[assignment, method-assign]
    waiting.callback(restore)
    _ACTIVE.callback(waiting.close)


class _Run:
    """One command with `--kv`, from its flags to the end of the process."""

    def __init__(self, module: ModuleType, command: str, parser: argparse.ArgumentParser) -> None:
        from leankv_mlx.mlx_lm.commands import SESSIONS, hooked
        from leankv_mlx.mlx_lm.patches import replaced

        self.session = SESSIONS[command](f"{_PACKAGE}.{command}")
        self.failed = False
        self.session.prepare(parser, UNCOMPRESSED)
        _ACTIVE.enter_context(hooked(module, self.session, self.guard))
        _ACTIVE.enter_context(replaced(sys, "excepthook", self.report))
        atexit.register(self.finish)
        _ACTIVE.callback(atexit.unregister, self.finish)

    def guard(self, call: Callable[[], Any]) -> Any:
        """Our errors end the process with one line and their exit code."""
        try:
            return call()
        except LeanKVError as error:
            if threading.current_thread() is not threading.main_thread():
                raise  # the server answers the request with it
            self.failed = True
            _leave(error)

    def report(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Our errors from inside a model, through functions that are not guarded: one line."""
        self.failed = True
        if isinstance(error, LeanKVError):
            print(error_line(error), file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    def finish(self) -> None:
        """At the end of the process: the summary, if it ended well."""
        from leankv_mlx.mlx_lm.commands import print_summary

        if not self.failed:
            print_summary(self.session)
        uninstall()  # while everything that it needs is still there


def _running(command: str) -> ModuleType | None:
    """The module whose `main` runs: with `python -m mlx_lm.COMMAND` it is `__main__`."""
    name = f"{_PACKAGE}.{command}"
    main = sys.modules.get("__main__")
    if getattr(getattr(main, "__spec__", None), "name", None) == name:
        return main
    return sys.modules.get(name)


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """Flags of `mlx_lm.generate` without `--kv`: a compressed file would only raise a KeyError."""
    from leankv_mlx.mlx_lm.cache_files import has_magic

    file = getattr(args, "prompt_cache_file", None)
    if file is not None and has_magic(file):
        _leave(UsageError(f"{file} holds a compressed cache; add --kv leankv."))
    return args
