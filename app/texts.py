"""Sentences of the main screen."""

from leankv_app.format import counted, megabytes, model_name
from leankv_mlx.engine.catalogue import catalogue
from leankv_mlx.engine.events import Downloading, Recoded, Snapshot

WELCOME = "Type a question, /file PATH to put a document in context, or F1 for help."
FAILURES = {"load": "Model", "kv": "Compression"}
"""Titles of dialogs, by the kind of a `Failed`."""
NOT_SAVED = "Chats of this run are kept in memory only. Export with Ctrl+E what you want to keep."


def only_demo_model() -> str:
    """What to load for a chat, and what the bundled model is there for meanwhile."""
    offers = [
        f"  /model {entry.name:<15}{megabytes(entry.weights):>9}"
        for entry in catalogue()
        if entry.offered
    ]
    return "\n".join(
        [
            "To chat, load a model; it is downloaded once:",
            *offers,
            "  /model FILE.gguf    one that you have; Ctrl+O lists more models",
            "",
            "Until then there is the bundled demo model. It cannot chat: it looks facts up in a "
            "document and gives its first sentences as a summary. /demo gives it a document.",
        ]
    )


def downloading(event: Downloading) -> str:
    """How far a download is."""
    of = f" of {megabytes(event.total)}" if event.total else ""
    return f"downloading {event.model}: {megabytes(event.done)}{of}"


def resumed(model: str, kv: str) -> str:
    """What a session goes on with."""
    return f"This chat goes on with what it had: {model_name(model) or 'the demo model'}, {kv}."


def recoded(event: Recoded) -> str:
    """What another compression means for this conversation."""
    if event.reread:
        return (
            f"{event.kv}: more bits cannot be won back from fewer, so the conversation is "
            "read again with your next message."
        )
    if event.before:
        return f"{event.kv}: re-encoded, {megabytes(event.before)} -> {megabytes(event.after)}."
    return f"{event.kv} from now on."


def saving(now: Snapshot) -> tuple[str, bool]:
    """What the compression is worth now, and whether it saves anything."""
    if not now.tokens:
        return "no tokens yet", False
    if now.tokens <= now.exact_until and not now.codes:
        after = counted(now.exact_until, "token")
        return f"all tokens still exact; saving starts after {after}", False
    if now.ratio > 1.005:
        return f"{now.ratio:.2f}x smaller", True
    if now.exact_until and now.ratio < 0.995:
        return f"{1 / now.ratio:.2f}x larger than fp16", False
    return "as large as fp16", False
