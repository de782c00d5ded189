"""One conversation: its messages in the store, its requests to the engine. Knows no widget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from leankv_app.format import shortened
from leankv_app.settings import Settings
from leankv_app.store import TITLE_LENGTH, Message, SessionInfo, Store, StoreError
from leankv_mlx.documents.readers import Document, document_head
from leankv_mlx.engine.events import Done, Failed, Stopped, Text
from leankv_mlx.engine.requests import EngineLike, Forget, Read, Recode, Reply, Turn

CHECKPOINT_SECONDS = 1.0
SUMMARIZE_CHAT = (
    "Summarize our conversation so far in a few sentences, with every fact, name and number "
    "that a later question may need."
)
_SUMMARY = "Summary of our conversation so far:\n{}\n\n"


class Chat:
    """What is said, kept and asked.

    Args:
        lost: called when the store fails; the chat then goes on in memory.
    """

    def __init__(
        self, store: Store, engine: EngineLike, settings: Settings, lost: Callable[[str], None]
    ) -> None:
        self.store = store
        self.engine = engine
        self.settings = settings
        self.messages: list[Message] = []
        self.documents: list[Document] = []
        self.system = settings.system
        self.kv = settings.kv
        self.model = ""
        self.session = 0
        self.title = ""
        self.running: Message | None = None
        self.request = 0
        self.reading = 0
        self._numbers = count(1)
        self._lost = lost
        self._written = 0

    # What the user does

    @property
    def busy(self) -> bool:
        """Whether a reply is on its way."""
        return self.running is not None

    def attach(self, document: Document) -> int:
        """Put a document in front of the next question and read it now; the request's number."""
        self.documents.append(document)
        head = Turn("user", self._documents())
        turns = _merged([*self.turns(self.messages), head])
        self.reading = next(self._numbers)
        # What was said before does not go into the cache of documents.
        name = "" if self.messages else self._names()
        self.engine.submit(Read(self.reading, tuple(turns), name))
        return self.reading

    def ask(self, text: str) -> Message:
        """Save the user's message and ask for a reply; the reply that begins to run."""
        shown = ""
        if self.documents:
            shown = f"[{self._names()}] {text}"
            text = self._documents() + text
            self.documents.clear()
        self._begin(shown or text)
        self._add(Message("user", text, shown))
        return self._reply(Message("assistant", "", status="running"), self.turns(self.messages))

    def compact(self) -> Message | None:
        """Ask for a summary that will stand for everything before it; None if nothing is there."""
        if not any(message.role == "assistant" for message in self.messages):
            return None
        asked = _merged([*self.turns(self.messages), Turn("user", SUMMARIZE_CHAT)])
        return self._reply(Message("summary", "", status="running"), asked)

    def regenerate(self) -> Message | None:
        """Ask for the last reply again; None if there is none."""
        if self.busy:
            return None
        dropped = []
        while self.messages and self.messages[-1].role != "user":
            dropped.append(self.messages.pop())
        if not self.messages:
            self.messages = dropped[::-1]
            return None
        self._safely(lambda store: store.remove(dropped))
        last = self.messages[-1]
        if last.status == "failed":
            last.status = "done"
            self._safely(lambda store: store.update(last))
        return self._reply(Message("assistant", "", status="running"), self.turns(self.messages))

    def stop(self) -> bool:
        """Stop what is running; False if nothing is."""
        if self.running is not None:
            self.engine.stop(self.request)
            return True
        if self.reading:
            self.engine.stop(self.reading)
            return True
        return False

    def recode(self, kv: str) -> None:
        """Change the compression of this session."""
        self.kv = kv
        if self.session:
            self._safely(lambda store: store.change(self.session, kv=kv))
        self.engine.submit(Recode(kv))

    def leave(self) -> None:
        """Stop a reply that is still running and keep what there is of it."""
        if (running := self.running) is not None:
            self.engine.stop(self.request)
            running.status = "stopped"
            self.running, self.request = None, 0
            self._safely(lambda store: store.update(running))

    def move_to(self, store: Store) -> None:
        """Go on with another database; this conversation is written there."""
        self.store = store
        if self.session:
            self.session = store.create(self.model, self.kv, self.system)
            for message in self.messages:
                store.add(self.session, message)

    def new(self) -> None:
        """Begin another conversation."""
        self.leave()
        if self.reading:
            self.engine.stop(self.reading)
        self.messages, self.documents = [], []
        self.session, self.title = 0, ""
        self.reading = 0
        self.system = self.settings.system
        self.engine.submit(Forget())

    def resume(self, info: SessionInfo) -> None:
        """Continue a saved conversation."""
        self.new()
        found: list[Message] = []
        self._safely(lambda store: found.extend(store.messages(info.id)))
        self.messages = found
        self.session, self.title = info.id, info.title
        self.system = info.system or self.settings.system
        self._safely(lambda store: store.claim(info.id))

    def rename(self, title: str) -> None:
        """Give the conversation another title."""
        self.title = title
        self._begin(title)
        self._safely(lambda store: store.change(self.session, title=title))

    def set_system(self, text: str) -> None:
        """Set the system prompt of this session."""
        self.system = text
        if self.session:
            self._safely(lambda store: store.change(self.session, system=text))

    # What the engine says

    def knows(self, request: int) -> bool:
        """Whether an event is of this conversation, or of none; what was left speaks on a while."""
        return request in (0, self.request, self.reading)

    def text(self, event: Text) -> bool:
        """A piece of the reply; True if it belongs to this conversation."""
        if self.running is None or event.request != self.request:
            return False
        self.running.text += event.text
        return True

    def checkpoint(self) -> None:
        """Write what there is of the reply; to be called every `CHECKPOINT_SECONDS`."""
        running = self.running
        if running is not None and len(running.text) != self._written:
            self._written = len(running.text)
            self._safely(lambda store: store.update(running))

    def ended(self, event: Done | Stopped | Failed) -> Message | None:
        """The reply that ended with this event, None if it was something else."""
        if self.reading and event.request == self.reading:
            self.reading = 0
            if not isinstance(event, Done):
                self.documents.clear()
            return None
        running = self.running
        if running is None or event.request != self.request:
            return None
        self.running = None
        running.status = _STATUS[type(event)]
        if isinstance(event, Failed) and running.role == "assistant" and not running.text:
            self._fail(running)
        elif running.role == "summary" and running.status != "done":
            self.messages.remove(running)
            self._safely(lambda store: store.remove([running]))
        else:
            self._safely(lambda store: store.update(running))
        return running

    def turns(self, messages: Sequence[Message]) -> tuple[Turn, ...]:
        """The conversation as the model reads it."""
        turns: list[Turn] = [Turn("system", self.system)] if self.system else []
        start, prefix = len(turns), ""
        for message in messages:
            if message.role == "summary":
                if message.status != "running":
                    del turns[start:]
                    prefix = _SUMMARY.format(message.text.strip())
            elif message.role == "user" and message.status != "failed":
                turns.append(Turn("user", prefix + message.text))
                prefix = ""
            elif message.role == "assistant" and message.text:
                turns.append(Turn("assistant", message.text))
        return tuple(_merged(turns))

    # Inside

    def _names(self) -> str:
        return ", ".join(document.name for document in self.documents)

    def _documents(self) -> str:
        return document_head("\n\n".join(document.text for document in self.documents))

    def _reply(self, message: Message, turns: Sequence[Turn]) -> Message:
        self._add(message)
        self.running = message
        self.request = next(self._numbers)
        self._written = 0
        settings = self.settings
        self.engine.submit(
            Reply(
                self.request,
                tuple(turns),
                settings.max_tokens,
                settings.temperature,
                settings.top_p,
            )
        )
        return message

    def _fail(self, running: Message) -> None:
        """A question that got no word of a reply must not spoil the next ones."""
        self.messages.remove(running)
        self._safely(lambda store: store.remove([running]))
        if self.messages and self.messages[-1].role == "user":
            last = self.messages[-1]
            last.status = "failed"
            self._safely(lambda store: store.update(last))

    def _begin(self, title: str) -> None:
        if self.session:
            return

        def create(store: Store) -> None:
            self.session = store.create(self.model, self.kv, self.system)

        self._safely(create)
        self.title = self.title or shortened(title, TITLE_LENGTH)

    def _add(self, message: Message) -> None:
        self.messages.append(message)
        self._safely(lambda store: store.add(self.session, message))

    def _safely(self, change: Callable[[Store], Any]) -> None:
        """Change the store; when it fails, keep the conversation in memory and say so."""
        try:
            change(self.store)
        except StoreError as error:
            if not self.store.saved:
                raise
            had_session = bool(self.session)
            self.move_to(Store(None))
            if not had_session:
                change(self.store)
            self._lost(str(error))


_STATUS: dict[type, str] = {Done: "done", Stopped: "stopped", Failed: "failed"}


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbouring messages of one role as one: templates want them to alternate."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1] = Turn(turn.role, f"{merged[-1].text}\n\n{turn.text}")
        else:
            merged.append(turn)
    return merged
