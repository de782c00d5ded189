"""Slash commands: what there is, what it does, and how it is completed."""

from __future__ import annotations

from collections.abc import Sequence

from leankv_app.allowed import choices
from leankv_app.factory import kv_choices
from leankv_app.settings import Settings
from leankv_mlx.engine.catalogue import catalogue
from leankv_mlx.folders import expanded

COMMANDS: dict[str, str] = {
    "/help": "keys and commands",
    "/model": "choose a model: /model [NAME, hub id, folder or .gguf file]",
    "/system": "system prompt of this chat: /system TEXT",
    "/set": "settings, or one of them: /set temperature 0.7",
    "/file": "put a document in context: /file PATH or address",
    "/summarize": "summarize the document: /summarize [PATH]",
    "/demo": "put a sample document in context, with questions to ask",
    "/kv": "compression of this chat: /kv small, /kv k3v2, /kv none",
    "/stats": "numbers of the cache and the last reply",
    "/compact": "replace the conversation by its summary, to free context",
    "/clear": "a new chat (the old one stays saved)",
    "/regenerate": "ask for the last reply again",
    "/copy": "copy a reply: /copy [N], 1 is the last",
    "/export": "write the chat to Markdown: /export [PATH]",
    "/resume": "continue a session: /resume [NUMBER]",
    "/rename": "title of this chat: /rename TEXT",
    "/quit": "leave",
}

SLOW = ("/file", "/summarize", "/demo")
"""Those that read a document: a long one, or an address, must not hold the screen up."""


def complete(text: str) -> Sequence[str]:
    """What `text` could become; each entry is a whole line."""
    name, space, rest = text.partition(" ")
    if not space:
        return [command for command in COMMANDS if command.startswith(name)]
    options: Sequence[str] = ()
    if name == "/kv":
        options = kv_choices()
    elif name == "/model":
        paths = [path for path in paths_like(rest) if path.endswith(("/", ".gguf"))] if rest else []
        options = [*(entry.name for entry in catalogue()), *paths]
    elif name == "/set":
        field, named, _ = rest.partition(" ")
        if named:
            options = [f"{field} {value}" for value in choices(field)]
        else:
            options = [f"{each} " for each in Settings.__slots__]
    elif name in ("/file", "/summarize"):
        options = paths_like(rest)
    return [f"{name} {option}" for option in options if option.startswith(rest) and option != rest]


def paths_like(text: str) -> list[str]:
    """Files and folders that a path could go on to, hidden ones only if asked for."""
    folder, slash, start = text.rpartition("/")
    try:
        root = expanded(f"{folder}{slash}" or ".")
        entries = sorted(root.iterdir(), key=lambda path: path.name)
        found = [
            f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}"
            for path in entries
            if path.name.startswith(start) and (start or not path.name.startswith("."))
        ]
    except (OSError, ValueError):
        return []
    return found[:50]
