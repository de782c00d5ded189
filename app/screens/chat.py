"""The main screen: the conversation, the prompt, the memory panel."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, cast

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, Static

from leankv_app import texts
from leankv_app.chat import CHECKPOINT_SECONDS, Chat
from leankv_app.commands import COMMANDS, complete
from leankv_app.format import counted, model_name, sayable, sentence
from leankv_app.guard import Guarded
from leankv_app.link import EngineEvents
from leankv_app.options import Options
from leankv_app.settings import Settings
from leankv_app.slash import Slash
from leankv_app.store import Message, SessionInfo
from leankv_app.typed import command_of
from leankv_app.widgets.completions import CompletionList
from leankv_app.widgets.conversation import Conversation
from leankv_app.widgets.memory_panel import MemoryPanel
from leankv_app.widgets.message import Notice, ReplyMessage, UserMessage
from leankv_app.widgets.progress import ProgressLine
from leankv_app.widgets.prompt import Prompt
from leankv_app.widgets.status import StatusLine
from leankv_mlx.documents.readers import Document
from leankv_mlx.engine.events import (
    Done,
    Downloading,
    Event,
    Failed,
    Loaded,
    Loading,
    Noted,
    Prefill,
    Recoded,
    Snapshot,
    Stopped,
    Text,
)

if TYPE_CHECKING:
    from leankv_app.app import ChatApp
    from leankv_app.screens.models import Choice


class ChatScreen(Guarded, Screen[None]):
    """Shows what the chat and the engine say, and hands on what the user does."""

    def __init__(self, chat: Chat) -> None:
        super().__init__()
        self.chat = chat
        self.slash = Slash(self)
        self.loaded: Loaded | None = None
        self.snapshot: Snapshot | None = None
        self.done: Done | None = None
        self._reply: ReplyMessage | None = None
        self._reading = ""
        self._asked_aside = False

    def compose(self) -> ComposeResult:
        with Horizontal(id="main"):
            with Vertical(id="talk"):
                yield Static("leankv-chat", id="title", markup=False)
                yield Conversation()
                yield ProgressLine()
                yield CompletionList()
                yield Prompt(complete, self.chat.recent())
            yield MemoryPanel()
        yield StatusLine()
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.panel.set_class(not self.chat.settings.panel, "hidden")
        self.prompt.focus()
        self.set_interval(CHECKPOINT_SECONDS, self.chat.checkpoint)

    @property
    def chat_app(self) -> ChatApp:
        """The app with its own attributes."""
        return cast("ChatApp", self.app)

    @property
    def conversation(self) -> Conversation:
        """The messages."""
        return self.query_one(Conversation)

    @property
    def prompt(self) -> Prompt:
        """Where the user types."""
        return self.query_one(Prompt)

    @property
    def panel(self) -> MemoryPanel:
        """The memory panel."""
        return self.query_one(MemoryPanel)

    @property
    def progress(self) -> ProgressLine:
        """The line that says what is waited for."""
        return self.query_one(ProgressLine)

    def begin(self, options: Options, resumed: SessionInfo | None) -> None:
        """Resume and read what the command line asks for."""
        self.run_worker(self._begin(options, resumed))

    async def _begin(self, options: Options, resumed: SessionInfo | None) -> None:
        if resumed is not None:
            await self.resume(resumed)
        else:
            await self.note(texts.WELCOME)
            if options.resume:
                await self.note(f"There is no session {options.resume}.", error=True)
        for file in options.files:
            await self.slash.file(file)

    # What the user does

    async def on_prompt_submitted(self, event: Prompt.Submitted) -> None:
        if command := command_of(sayable(event.text)):
            await self.slash.run(*command)
        elif self.chat.busy:
            self.prompt.text = event.text
            self.notify("a reply is on its way; Esc stops it")
        else:
            await self.ask(event.text)

    def on_prompt_completions(self, event: Prompt.Completions) -> None:
        self.query_one(CompletionList).offer(event.choices, event.chosen, COMMANDS)

    def on_prompt_scroll(self, event: Prompt.Scroll) -> None:
        messages = self.conversation.messages
        scroll = messages.scroll_page_up if event.pages < 0 else messages.scroll_page_down
        scroll(animate=False)

    async def ask(self, text: str) -> None:
        """Send a question."""
        if self.chat.busy:
            self.notify("a reply is on its way; Esc stops it")
            return
        reply = self.chat.ask(text)
        question = self.chat.messages[-2]
        await self.conversation.add(UserMessage(question.shown or question.text))
        await self.follow(reply)
        self.show_title()

    async def follow(self, reply: Message, who: str = "Model") -> None:
        """Show a reply that begins to run."""
        self._reply = ReplyMessage(who=who)
        await self.conversation.add(self._reply)
        self.conversation.latest()

    async def regenerate(self) -> None:
        """Ask for the last reply again."""
        reply = self.chat.regenerate()
        if reply is None:
            await self.note("There is nothing to ask again.", error=True)
            return
        await self.conversation.show(self.chat.messages[:-1])
        await self.follow(reply)

    async def read(self, document: Document) -> None:
        """Put a document in context."""
        self._reading = document.name
        self.chat.attach(document)
        length = counted(len(document.text), "character")
        await self.note(f"{document.name}: {length}; ask about it.")

    def stop(self) -> None:
        """Stop what is running."""
        if self.slash.openings.stop():
            return
        if self.chat.stop():
            self.progress.wait("stopping …")

    async def new_chat(self) -> None:
        """Begin another conversation."""
        self.chat.new()
        self._reply = None
        self.progress.end()
        await self.conversation.show([])
        await self.note(texts.WELCOME)
        self.show_title()

    async def resume(self, info: SessionInfo) -> None:
        """Continue a saved conversation."""
        changed = self.chat.resume(info)
        self._reply = None
        self.progress.end()
        await self.conversation.show(self.chat.messages)
        if changed:
            await self.note(texts.resumed(self.chat.model, self.chat.kv))
        if info.busy:
            await self.note("This session is also open in another window.", error=True)
        self.show_title()
        self.conversation.latest()

    def load(self, model: str, kv: str = "") -> None:
        """Load another model; the conversation goes on with it."""
        self.chat_app.load(model, kv or self.chat.kv)

    def toggle_panel(self) -> None:
        """Show or hide the memory panel."""
        self.show_panel(self.panel.has_class("hidden"))

    def show_panel(self, shown: bool) -> None:
        """Show the memory panel where there is room for it, or hide it."""
        self.panel.set_class(not shown, "hidden")
        if not shown and self.panel.has_focus:
            self.prompt.focus()

    def focus_panel(self) -> None:
        """Give the panel its keys, or the prompt its own."""
        if self.panel.has_focus or not self.panel.display:
            self.prompt.focus()
        else:
            self.panel.focus()

    # Other screens

    def open_sessions(self) -> None:
        """The list of sessions."""
        from leankv_app.screens.sessions import sessions_of

        async def opened(info: SessionInfo | None) -> None:
            if info is not None:
                await self.resume(info)

        self.app.push_screen(sessions_of(self), opened)

    def open_models(self) -> None:
        """The model picker."""
        from leankv_app.screens.models import ModelsScreen

        def chosen(choice: Choice | None) -> None:
            if choice is not None:
                kv = f"leankv:{choice.kv}" if choice.kv else self.chat.kv
                self.load(choice.model, kv)

        self.app.push_screen(ModelsScreen(), chosen)

    def open_settings(self) -> None:
        """The settings."""
        from leankv_app.screens.settings import SettingsScreen

        def changed(settings: Settings | None) -> None:
            if settings is not None:
                self.chat_app.change_settings(settings)

        self.app.push_screen(SettingsScreen(self.chat_app.settings), changed)

    def say_error(self, title: str, text: str) -> None:
        """An error dialog."""
        from leankv_app.screens.dialog import MessageDialog

        self.app.push_screen(MessageDialog(title, sayable(text)))

    def store_failed(self, text: str) -> None:
        """Chats cannot be saved: say so, and offer a way out for a damaged database."""
        from leankv_app.screens.dialog import ConfirmDialog

        if "damaged" not in text or self._asked_aside:
            self.say_error("Chats are not saved", f"{text}\n\n{texts.NOT_SAVED}")
            return
        self._asked_aside = True

        def done(yes: bool | None) -> None:
            if not yes or not self.chat_app.set_aside():
                self.notify(texts.NOT_SAVED, severity="warning", timeout=10)

        question = f"{text}\n\nPut it aside and begin a new one with what it has? {texts.NOT_SAVED}"
        self.app.push_screen(ConfirmDialog("Chats are not saved", question, "Set aside"), done)

    async def note(self, text: str, error: bool = False) -> None:
        """A line of the app's own in the conversation."""
        await self.conversation.add(Notice(sayable(text), error))

    def show_title(self) -> None:
        """The title of the chat."""
        title = f" · {self.chat.title}" if self.chat.title else ""
        self.query_one("#title", Static).update(f"leankv-chat{title}")

    # What the engine says

    async def on_engine_events(self, message: EngineEvents) -> None:
        for event in message.events:
            await self._handle(event)

    async def _handle(self, event: Event) -> None:
        match event:
            case Text():
                if self.chat.text(event) and self._reply is not None:
                    self.progress.end()
                    await self._reply.write(event.text)
            case Snapshot():
                self.snapshot = event
                self.panel.memory(event)
                self.query_one(StatusLine).memory(event)
            case Prefill():
                self._prefill(event)
            case Loading():
                self.progress.wait(f"loading {model_name(event.model) or 'the demo model'} …")
            case Downloading():
                self._downloading(event)
            case Noted():
                await self.note(event.text)
            case Loaded():
                await self._model_loaded(event)
            case Recoded():
                await self._recoded(event)
            case Failed(kind="load" | "kv") | Stopped(stage="load"):
                await self._unchanged(event)
            case Done() | Stopped() | Failed():
                await self._ended(event)

    def _prefill(self, event: Prefill) -> None:
        if self.chat.stopping or not self.chat.knows(event.request):
            return
        if event.done >= event.total:
            self.progress.end()
        elif event.request == self.chat.reading:
            self.progress.wait(f"reading {self._reading}", event.done, event.total)
        elif event.request == self.chat.request and event.total > 64:
            self.progress.wait("reading the prompt", event.done, event.total)

    def _downloading(self, event: Downloading) -> None:
        self.chat.fetching = True
        if not self.chat.stopping:
            self.progress.wait(texts.downloading(event), event.done, event.total or None)

    async def _model_loaded(self, event: Loaded) -> None:
        self.progress.end()
        self.loaded, self.done = event, None
        gc.freeze()  # modules and the model: they stay
        self.chat.answered(event)
        self.panel.loaded(event)
        self.query_one(StatusLine).loaded(event, event.kv)
        if not event.model:
            await self.note(texts.only_demo_model())
        if not event.compressed:
            await self.note(f"{event.name} runs with an uncompressed cache: {event.note}.")

    async def _recoded(self, event: Recoded) -> None:
        self.chat.answered(event)
        name = self.loaded.name if self.loaded else "no model"
        self.query_one(StatusLine).model(name, event.kv, event.backend)
        await self.note(texts.recoded(event))

    async def _ended(self, event: Done | Stopped | Failed) -> None:
        if not self.chat.knows(event.request):
            return
        document = event.request != 0 and event.request == self.chat.reading
        self.progress.end()
        if isinstance(event, Done) and event.tokens:
            self.done = event
        ended = self.chat.ended(event)
        if ended is not None and self._reply is not None:
            view, self._reply = self._reply, None
            if ended in self.chat.messages:
                await view.finish(ended.text, ended.status)
            else:
                await view.remove()
                if self.chat.messages and self.chat.messages[-1].status == "failed":
                    self.conversation.query(UserMessage).last().mark("failed")
        if isinstance(event, Failed):
            self.say_error("Document" if document else "No reply", sentence(event.message))
        elif isinstance(event, Stopped) and document:
            await self.note("Stopped; the document is not in context.")

    async def _unchanged(self, event: Failed | Stopped) -> None:
        """A model or a compression is not to be had; what there was stays."""
        self.progress.end()
        self.chat.answered(event)
        if isinstance(event, Failed):
            self.say_error(texts.FAILURES[event.kind], sentence(event.message))
        if self.loaded is None:
            self.query_one(StatusLine).no_model()
        else:
            await self.note(f"{self.loaded.name} with {self.chat.kv} answers what comes next.")
