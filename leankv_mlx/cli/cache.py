"""`leankv cache`: documents and prompts that were read before and open without being read again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from leankv_mlx.cli.console import is_narrow, list_console, list_table
from leankv_mlx.errors import UsageError
from leankv_mlx.terminal import note, say, say_json

if TYPE_CHECKING:
    from leankv_mlx.mlx_lm.stored_prompts import StoredPrompts
    from leankv_mlx.serving.entries import Entry

_SHOWN, _SHOWN_NARROW = 12, 8
"""Digits of a key in the table; any number that is unambiguous does for rm."""


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    group = typer.Typer(
        help="Documents and prompts kept as compressed KV caches.",
        no_args_is_help=True,
        add_completion=False,
    )
    group.command("list")(show)
    group.command("rm")(remove)
    group.command("path")(path)
    app.add_typer(group, name="cache")


def show(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List what is kept, the most recently used first."""
    cache = _cache()
    entries = cache.entries()
    total = sum(entry.nbytes for entry in entries)
    if as_json:
        rows = [asdict(entry) for entry in entries]
        facts = {"path": str(cache.place), "limit": cache.limit, "nbytes": total, "entries": rows}
        say_json(facts)
        return
    _table(entries)
    say(f"{total / 1e6:.1f} MB of at most {cache.limit / 1e6:,.0f} MB in {cache.place}")


def _table(entries: Sequence[Entry]) -> None:
    if not entries:
        return
    out = list_console()
    narrow = is_narrow(out)
    table = list_table(out)
    table.add_column("key", no_wrap=True)
    for title in ("document",) if narrow else ("document", "model", "kv"):
        table.add_column(title, overflow="fold")
    for title in ("tokens", "MB", "last used"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        key = entry.key[: _SHOWN_NARROW if narrow else _SHOWN]
        texts = (_called(entry), entry.model, entry.kv)
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        numbers = (f"{entry.tokens:,}", f"{entry.nbytes / 1e6:.2f}", used)
        about = ("\n".join(texts),) if narrow else texts
        table.add_row(*map(Text, (key, *about, *numbers)))
    out.print(table)


def _called(entry: Entry) -> str:
    if entry.document or not entry.tokens:
        return entry.document or "(damaged)"
    return f"prompt of {entry.tokens:,} tokens"


def remove(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys as in the list, or their first digits.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
) -> None:
    """Remove kept documents and prompts."""
    if bool(keys) == everything:
        raise UsageError("name the keys of leankv cache list, or --all.")
    from leankv_mlx.serving.keys import is_ours

    cache = _cache()
    known = [entry.key for entry in cache.entries()]
    named = [_found(key, known) for key in keys or ()]
    chosen = [key for key in known if is_ours(key)] if everything else named
    freed = cache.remove(chosen)
    say(f"removed {len(set(chosen))}, {freed / 1e6:.1f} MB")


def path() -> None:
    """Print the folder."""
    say(str(_cache().place))


def _cache() -> StoredPrompts:
    from leankv_mlx.mlx_lm.stored_prompts import StoredPrompts

    return StoredPrompts(note)


def _found(start: str, known: Sequence[str]) -> str:
    matching = [key for key in known if key.startswith(start)] if start else []
    if len(matching) != 1:
        many = "more than one key begins" if matching else "no key begins"
        raise UsageError(f"{many} with '{start}'; see leankv cache list.")
    return matching[0]
