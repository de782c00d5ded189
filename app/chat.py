"""One conversation: its messages in the store, its requests to the engine. Knows no widget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from leankv_app.factory import full_kv
from leankv_app.format import sayable, shortened
from leankv_app.settings import Settings
from leankv_app.store import TITLE_LENGTH, Message, SessionInfo, Store, StoreError
from leankv_mlx.documents.readers import Document, document_head
from leankv_mlx.engine.compaction import SO_FAR, asked, merged
from leankv_mlx.engine.events import Done, Failed, Loaded, Recoded, Stopped, Text
from leankv_mlx.engine.requests import EngineLike, Forget, Load, Read, Recode, Reply, Turn
from leankv_mlx.errors import ConfigError

CHECKPOINT_SECONDS = 1.0


class Chat:
    """What is said, kept and asked.

    Args:
        lost: called when the store fails; the chat then goes on in memory.
        budget: bytes that the KV cache may take, 0 for what the machine has to spare.

    Attributes:
        model, kv: what the next message is for. They are what was asked for last, and become what
            the engine has once it has answered everything that was asked.
    """

    def __init__(
        self,
        store: Store,
        engine: EngineLike,
        settings: Settings,
        lost: Callable[[str], None],
        budget: int = 0,
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
        self.stopping = False
        self.fetching = False  # whether the model that is asked for is being downloaded
        self._budget = budget
        self._asked: list[Load | Recode] = []  # and not answered yet; the engine keeps their order
        self._served: tuple[str, str] | None = None  # model and kv that the engine has
        self._saved: tuple[str, str] = ("", "")  # those of the session's row
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
        name, text = sayable(document.name), sayable(document.text)
        self.documents.append(replace(document, name=name, text=text))
        head = Turn("user", self._documents())
        turns = merged([*self.turns(self.messages), head])
        self.reading, self.stopping = next(self._numbers), False
        # What was said before does not go into the cache of documents.
        name = "" if self.messages else self._names()
        self.engine.submit(Read(self.reading, turns, name))
        return self.reading

    def ask(self, text: str) -> Message:
        """Save the user's message and ask for a reply; the reply that begins to run."""
        shown, text = "", sayable(text)
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
        turns = asked(self.turns(self.messages))
        return self._reply(Message("summary", "", status="running"), turns)

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
        """Stop a reply, else a document, else the download of a model; False where nothing runs
        that is known to end by it."""
        if number := self.request if self.busy else self.reading:
            self.engine.stop(number)
            self.stopping = True
        elif any(isinstance(request, Load) for request in self._asked):
            self.engine.stop(0)  # does nothing to a model that is on the disk
            self.stopping = self.fetching
        return self.stopping

    def load(self, model: str, kv: str) -> None:
        """Go on with another model."""
        self._ask_for(Load(model, kv, self._budget), model, kv)

    def recode(self, kv: str) -> None:
        """Go on with another compression."""
        self._ask_for(Recode(kv), self.model, kv)

    def leave(self) -> None:
        """Stop a reply that is still running and keep what there is of it."""
        if (running := self.running) is not None:
            self.engine.stop(self.request)
            running.status = "stopped"
            self.running, self.request = None, 0
            self._settle(running)

    def move_to(self, store: Store) -> None:
        """Go on with another database; this conversation is written there."""
        self.store = store
        if self.session:
            self._saved = self.model, self.kv
            self.session = store.create(*self._saved, self.system)
            for message in self.messages:
                store.add(self.session, message)

    def new(self) -> None:
        """Begin another conversation."""
        self.leave()
        if self.reading:
            self.engine.stop(self.reading)
        self.messages, self.documents = [], []
        self.session, self.title = 0, ""
        self.reading, self.stopping = 0, False
        self.system = self.settings.system
        self.engine.submit(Forget())

    def resume(self, info: SessionInfo) -> bool:
        """Continue a saved conversation with the model and the setting that it had; whether they
        are others than those now in use."""
        self.new()
        found: list[Message] = []
        self._safely(lambda store: found.extend(store.messages(info.id)))
        self.messages = found
        self.session, self.title = info.id, info.title
        self.system = info.system
        self._saved = info.model, info.kv
        self._safely(lambda store: store.claim(info.id))
        kv = _known(info.kv) or self.kv
        before = self.model, self.kv
        if info.model != self.model or (self._served is None and not self._asked):
            self.load(info.model, kv)
        elif kv != self.kv:
            self.recode(kv)
        return (self.model, self.kv) != before

    def rename(self, title: str) -> None:
        """Give the conversation another title."""
        title = self.title = sayable(title)
        self._begin(title)
        self._safely(lambda store: store.change(self.session, title=title))

    def set_system(self, text: str) -> None:
        """Set the system prompt of this session."""
        text = self.system = sayable(text)
        if self.session:
            self._safely(lambda store: store.change(self.session, system=text))

    def recent(self) -> list[str]:
        """What the user wrote lately, in this session and those before."""
        try:
            sessions = self.store.sessions(limit=5)
            messages = [m for info in sessions[::-1] for m in self.store.messages(info.id)]
        except StoreError:
            return []
        return [m.text for m in messages if m.role == "user" and not m.shown][-100:]

    # What the engine says

    def answered(self, event: Loaded | Recoded | Failed | Stopped) -> None:
        """What was asked of the model and its compression is done, or could not be."""
        del self._asked[:1]
        if not isinstance(event, Recoded):
            self.fetching = self.stopping = False
        if isinstance(event, Loaded):
            self._served = event.model, event.kv
        elif isinstance(event, Recoded) and self._served is not None:
            self._served = self._served[0], event.kv
        if self._asked or self._served is None:
            return
        self.model, self.kv = self._served
        if isinstance(event, Loaded | Recoded):  # what fails is asked for again the next time
            self._keep_choice()

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
            self.reading, self.stopping = 0, False
            if not isinstance(event, Done):
                self.documents.clear()
            return None
        running = self.running
        if running is None or event.request != self.request:
            return None
        self.running, self.stopping = None, False
        running.status = _STATUS[type(event)]
        if isinstance(event, Failed) and running.role == "assistant" and not running.text:
            self._fail(running)
        else:
            self._settle(running)
        return running

    def turns(self, messages: Sequence[Message]) -> tuple[Turn, ...]:
        """The conversation as the model reads it."""
        turns: list[Turn] = [Turn("system", self.system)] if self.system else []
        start, prefix = len(turns), ""
        for message in messages:
            if message.role == "summary":
                if message.status == "done":  # half of one stands for nothing
                    del turns[start:]
                    prefix = SO_FAR.format(message.text.strip())
            elif message.role == "user" and message.status != "failed":
                turns.append(Turn("user", prefix + message.text))
                prefix = ""
            elif message.role == "assistant" and message.text:
                turns.append(Turn("assistant", message.text))
        return merged(turns)

    # Inside

    def _names(self) -> str:
        return ", ".join(document.name for document in self.documents)

    def _documents(self) -> str:
        return document_head("\n\n".join(document.text for document in self.documents))

    def _reply(self, message: Message, turns: Sequence[Turn]) -> Message:
        self._add(message)
        self.running, self.stopping = message, False
        self.request = next(self._numbers)
        self._written = 0
        self._keep_choice()
        settings = self.settings
        self.engine.submit(
            Reply(
                self.request,
                tuple(turns),
                settings.max_tokens,
                settings.temperature,
                settings.top_p,
                self.model,
                message.role == "summary",
            )
        )
        return message

    def _ask_for(self, request: Load | Recode, model: str, kv: str) -> None:
        self.model, self.kv = model, kv
        self._asked.append(request)
        self.engine.submit(request)

    def _keep_choice(self) -> None:
        """Let the session be resumed with what its last message was for, or what was chosen."""
        model, kv = chosen = self.model, self.kv
        if self.session and chosen != self._saved:
            self._saved = chosen
            self._safely(lambda store: store.change(self.session, model=model, kv=kv))

    def _settle(self, ended: Message) -> None:
        """Keep a reply as far as it came; half a summary would hide what it was to stand for."""
        if ended.role == "summary" and ended.status != "done":
            self.messages.remove(ended)
            self._safely(lambda store: store.remove([ended]))
        else:
            self._safely(lambda store: store.update(ended))

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
            self._saved = self.model, self.kv
            self.session = store.create(*self._saved, self.system)

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


def _known(kv: str) -> str:
    """A saved setting in full; "" for one that this version does not know."""
    try:
        return full_kv(kv)
    except ConfigError:
        return ""
