"""Our flags beside those of mlx-lm's commands. Imports neither mlx nor mlx-lm."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path

from leankv_mlx.errors import ModelError

_KV = (
    "KV cache: leankv, leankv:SPEC (for example leankv:k4v3,window=128), a profile such as small, "
    "or none for the uncompressed cache (default: %(default)s)"
)
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


def generate_help(prog: str, default_kv: str) -> str:
    """What `leankv generate --help` prints, within half a second.

    Importing mlx-lm takes several, most of it in libraries that a parser has no use for. So of its
    `generate.py` only the function that makes the parser is run, with the constants that it names.

    Raises:
        ModelError: mlx-lm is not installed.
    """
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        raise ModelError("mlx-lm is not installed; run pip install mlx-lm.")
    source = Path(spec.origin).with_name("generate.py")
    nodes = [node for node in ast.parse(source.read_text()).body if _makes_the_parser(node)]
    names: dict[str, object] = {"argparse": argparse}
    exec(compile(ast.Module(nodes, []), str(source), "exec"), names)
    parser: argparse.ArgumentParser = names["setup_arg_parser"]()  # type: ignore[operator]
    parser.prog = prog
    add_flags(parser, default_kv, demo=True, file=True)
    return parser.format_help()


def _makes_the_parser(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):  # of a constant
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.FunctionDef) and node.name in ("setup_arg_parser", "str2bool")
