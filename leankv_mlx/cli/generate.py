"""`leankv generate`: mlx-lm's generate command with `--kv` and `--file`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from leankv_mlx.cli import reading
from leankv_mlx.cli.running import HANDED_ON
from leankv_mlx.errors import UsageError

if TYPE_CHECKING:
    from leankv_mlx.config import CompressionConfig
    from leankv_mlx.mlx_lm import LoadedModel

_PROG = "leankv generate"
_KV = "leankv"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("generate", **HANDED_ON)(generate)


def generate(context: typer.Context) -> None:
    """Generate text: mlx-lm's own flags, --kv and --file (see leankv generate --help)."""
    from leankv_mlx.mlx_lm.flags import generate_help

    if {"-h", "--help"} & set(context.args):
        typer.echo(generate_help(_PROG, _KV), nl=False)
        return
    # A short flag never changes its meaning from one of our commands to the next.
    if any(word == "-m" or re.fullmatch(r"-m=?-?\d+", word) for word in context.args):
        raise UsageError(
            "-m is --model in commands of leankv and --max-tokens in mlx-lm's; write it out here."
        )
    from leankv_mlx.mlx_lm.commands import run_generate

    run_generate(context.args, _PROG, _KV, documents=_Documents())


class _Documents:
    """What `--file` needs of the layer of documents."""

    def read(self, source: str) -> tuple[str, str]:
        """The name of a document, and what a message about it begins with."""
        from leankv_mlx.documents.readers import document_head

        found = reading.document(source)
        return found.name, document_head(found.text)

    def open(
        self,
        loaded: LoadedModel,
        config: CompressionConfig | None,
        prefix: Sequence[int],
        name: str,
        keep: bool,
    ) -> list[Any]:
        """Caches that hold `prefix`."""
        from leankv_mlx.documents.prefix import Opener

        opener = Opener(loaded, config, reading.store(no_cache=not keep))
        with reading.Waiting(name) as waiting:
            return opener.open(prefix, name, waiting.reading).caches
