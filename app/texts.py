"""Sentences of the main screen."""

WELCOME = "Type a question, /file PATH to put a document in context, or F1 for help."
NOT_SAVED = "Chats of this run are kept in memory only. Export with Ctrl+E what you want to keep."
DEMO_MODEL = (
    "The bundled demo model looks facts up in a document and gives its first sentences as a "
    "summary. It cannot chat. /demo gives it a document, /model chooses another model."
)
