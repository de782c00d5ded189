"""Our flags beside those of mlx-lm's commands. Imports neither mlx nor mlx-lm."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from leankv_mlx.errors import ModelError

_KV = (
    "KV cache: leankv, leankv:SPEC (for example leankv:k4v3,window=128), a profile such as small, "
    "or none for the uncompressed cache (default: %(default)s)"
)
_KV_MEMORY = (
    "With --kv: bytes of KV cache, for example 8GB, that all requests and kept prompts may take on "
    "this machine; requests beyond wait (default: three quarters of the memory beside the model)"
)
_KV_STORE = (
    "With --kv: folder for beginnings of prompts that came more than once, which a later start "
    "opens without reading them; on for the folder of leankv cache path"
)
_KV_STORE_SIZE = "With --kv-store: bytes that its files may take, for example 16GB"
_FILE = (
    "Document (path or http(s) address) that --prompt is about; it is kept as a compressed KV "
    "cache and opened at once the next time"
)


def add_flags(
    parser: argparse.ArgumentParser, default_kv: str, demo: bool = False, file: bool = False
) -> None:
    """Add `--kv` to a parser of mlx-lm.

    Args:
        demo: whether the command runs on the bundled model where none is named.
        file: whether there is a flag `--file` too.
    """
    parser.add_argument("--kv", metavar="KV", default=default_kv, help=_KV)
    if file:
        parser.add_argument("--file", help=_FILE)
    for action in parser._actions:
        if demo and action.dest == "model":
            action.help = "Folder, GGUF file or hub id of the model (default: the bundled one)"


def add_serving_flags(parser: argparse.ArgumentParser, short: bool = False) -> None:
    """Add what `mlx_lm.server` has beside `--kv`; the texts become numbers in its session.

    Args:
        short: whether the model can be named by `-m`, as in our own commands.
    """
    if short:
        default = argparse.SUPPRESS  # that of --model stands
        parser.add_argument("-m", dest="model", default=default, help="Short for --model")
    parser.add_argument("--kv-memory", metavar="SIZE", help=_KV_MEMORY)
    parser.add_argument("--kv-store", metavar="FOLDER", help=_KV_STORE)
    parser.add_argument("--kv-store-size", metavar="SIZE", help=_KV_STORE_SIZE)


def generate_help(prog: str, default_kv: str) -> str:
    """What `leankv generate --help` prints, within half a second.

    Raises:
        ModelError: mlx-lm is not installed.
    """
    names = _run("generate", _makes_the_parser)
    parser: argparse.ArgumentParser = names["setup_arg_parser"]()  # type: ignore[operator]
    parser.prog = prog
    add_flags(parser, default_kv, demo=True, file=True)
    return parser.format_help()


def serve_help(prog: str, default_kv: str) -> str:
    """What `leankv serve --help` prints, within half a second.

    Raises:
        ModelError: mlx-lm is not installed.
    """
    constants = _run("generate", lambda node: isinstance(node, ast.Assign) and _is_constant(node))
    names = constants | {"json": json, "_parse_size": str}
    parser = _run("server", _makes_part_of_a_parser, "main", names)["parser"]
    assert isinstance(parser, argparse.ArgumentParser)
    parser.prog = prog
    add_flags(parser, default_kv, demo=True)
    add_serving_flags(parser, short=True)
    return parser.format_help()


def _run(
    command: str,
    wanted: Callable[[ast.stmt], bool],
    function: str | None = None,
    names: dict[str, object] | None = None,
) -> dict[str, object]:
    """Run some statements of a command of mlx-lm, or of a function in it; returns its names.

    Importing mlx-lm takes several seconds, most of it in libraries that a parser has no use for.
    """
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        raise ModelError("mlx-lm is not installed; run pip install mlx-lm.")
    source = Path(spec.origin).with_name(f"{command}.py")
    body = ast.parse(source.read_text()).body
    if function is not None:
        body = next(
            node.body
            for node in body
            if isinstance(node, ast.FunctionDef) and node.name == function
        )
    found: dict[str, object] = {"argparse": argparse, **(names or {})}
    exec(compile(ast.Module([n for n in body if wanted(n)], []), str(source), "exec"), found)
    return found


def _makes_the_parser(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return _is_constant(node)
    return isinstance(node, ast.FunctionDef) and node.name in ("setup_arg_parser", "str2bool")


def _is_constant(node: ast.Assign) -> bool:
    return isinstance(node.value, ast.Constant)


def _makes_part_of_a_parser(node: ast.stmt) -> bool:
    """`parser = ...` and `parser.add_argument(...)`."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "parser"
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("parser.add_argument")
