"""Sentences of the main screen."""

from leankv_app.format import megabytes
from leankv_mlx.engine.catalogue import catalogue

WELCOME = "Type a question, /file PATH to put a document in context, or F1 for help."
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
