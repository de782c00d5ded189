"""The app: settings, store and engine, and the actions that keys and the palette have in common."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import ModalScreen, Screen
from textual.worker import WorkerFailed

from leankv_app import settings as configuration
from leankv_app.border import Border
from leankv_app.chat import Chat
from leankv_app.factory import MakeEngine, full_kv
from leankv_app.format import sentence
from leankv_app.guard import Guarded
from leankv_app.link import EngineLink
from leankv_app.options import Options
from leankv_app.paths import Paths
from leankv_app.screens.chat import ChatScreen
from leankv_app.store import SessionInfo, Store, StoreError
from leankv_mlx.engine.catalogue import in_full
from leankv_mlx.engine.record import Recorder
from leankv_mlx.engine.requests import Emit
from leankv_mlx.faults import described
from leankv_mlx.profiles import put_damaged_aside

if TYPE_CHECKING:
    from textual.notifications import SeverityLevel

    from leankv_app.settings import Settings

QUIT_SECONDS = 2.0
_OF_CHAT = {
    "help", "stop", "new_chat", "sessions", "models", "panel", "focus_panel", "settings",
    "regenerate", "export", "latest",
}  # fmt: skip


class ChatApp(Guarded, App[None]):
    """leankv-chat."""

    TITLE = "leankv-chat"
    CSS_PATH = "app.tcss"
    # Textual's own annotation makes these two variables of an instance.
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (14, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help", id="app.help"),
        Binding("escape", "stop", "Stop", id="chat.stop"),
        Binding("ctrl+n", "new_chat", "New", id="chat.new", priority=True),
        Binding("ctrl+s", "sessions", "Sessions", id="chat.sessions"),
        Binding("ctrl+o", "models", "Models", id="chat.models", priority=True),
        Binding("ctrl+b", "panel", "Memory", id="panel.toggle", priority=True),
        Binding("f2", "focus_panel", "Into panel", id="panel.focus", show=False),
        Binding("f3", "settings", "Settings", id="app.settings", show=False),
        Binding("ctrl+r", "regenerate", "Again", id="chat.regenerate", priority=True, show=False),
        Binding("ctrl+e", "export", "Export", id="chat.export", priority=True, show=False),
        Binding("end", "latest", "Latest", id="app.latest", show=False),
        Binding("ctrl+c", "copy_or_quit", "Copy", id="app.copy", priority=True, show=False),
        Binding("ctrl+q", "quit", "Quit", id="app.quit", priority=True),
    ]

    def __init__(self, options: Options, paths: Paths, make_engine: MakeEngine) -> None:
        super().__init__()
        self._border = Border()
        self.options = options
        self.paths = paths
        self.last_words: list[str] = []
        self.settings, problem = configuration.load(paths.settings)
        self._problems = {"Settings": problem, "Profiles": put_damaged_aside()}
        self.link = EngineLink()
        emit: Emit = self.link
        self._recorder: Recorder | None = None
        if options.record is not None:
            emit = self._recorder = Recorder(options.record, self.link)
        self.engine = make_engine(emit)
        self._store_problem = ""
        session = replace(
            self.settings,
            kv=full_kv(options.kv) if options.kv else self._saved_kv(),
            system=self.settings.system if options.system is None else options.system,
        )
        store = self._open_store()
        self.chat = Chat(store, self.engine, session, self._lost_store, options.budget)
        self.chat_screen = ChatScreen(self.chat)
        self._interrupted = 0.0

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Those of Textual, and the border to the terminal."""
        return [*super().get_line_filters(), self._border]

    def _saved_kv(self) -> str:
        try:
            return full_kv(self.settings.kv, stored=True)
        except ValueError as error:  # ConfigError, or a number too long to be one
            self._problems["Compression"] = f"{error} Until it is set anew leankv is in use."
            return "leankv"

    def _open_store(self) -> Store:
        try:
            return Store(self.paths.database)
        except StoreError as error:
            self._store_problem = str(error)
            return Store(None)

    def on_mount(self) -> None:
        if self.settings.theme in self.available_themes:
            self.theme = self.settings.theme
        self.link.connect(self.chat_screen.post_message)
        self.push_screen(self.chat_screen)
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        """After the first paint: from here on the engine's thread imports mlx."""
        gc.freeze()  # what lives as long as the app need not be searched for garbage
        self.engine.start()
        resumed = self._to_resume()
        if resumed is None:
            self.load(self.options.model or self.settings.model, self.chat.kv)
        self.chat_screen.begin(self.options, resumed)
        for title, problem in self._problems.items():
            if problem:
                self.chat_screen.say_error(title, problem)
        if self._store_problem:
            self.chat_screen.store_failed(self._store_problem)

    def load(self, model: str, kv: str) -> None:
        """Load a model by its name in the list, hub id or path."""
        self.chat.load(in_full(model), kv)

    def _to_resume(self) -> SessionInfo | None:
        """The session that the command line names; what it says beside it goes before what the
        session had."""
        options = self.options
        try:
            found = self.chat.store.find(options.resume) if options.resume else None
        except StoreError as error:
            self.chat_screen.say_error("Chats", str(error))
            return None
        if found is None:
            return None
        return replace(
            found,
            model=found.model if options.model is None else in_full(options.model),
            kv=full_kv(options.kv) if options.kv else found.kv,
            system=found.system if options.system is None else options.system,
        )

    def _lost_store(self, text: str) -> None:
        self.chat_screen.store_failed(text)

    async def tell(self, error: BaseException) -> None:
        """Say an error that came to the border, in one line of the chat."""
        text = str(error) if isinstance(error, StoreError) else described(error)
        await self.chat_screen.note(sentence(text), error=True)

    def _handle_exception(self, error: Exception) -> None:
        """What Textual calls to end the app: a worker that failed does not have to."""
        if isinstance(error, WorkerFailed):
            self.call_later(self.tell, error.error)
        else:
            super()._handle_exception(error)

    def _fatal_error(self) -> None:
        """The net behind the border, for what breaks a widget of Textual's own."""
        assert self._exception is not None
        self.panic(Text(f"leankv-chat: error: {described(self._exception)}"))

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = False,
    ) -> None:
        """A toast. Never markup: what it says comes from paths, errors and models."""
        super().notify(message, title=title, severity=severity, timeout=timeout, markup=False)

    def set_aside(self) -> bool:
        """Put a damaged database aside and go on with a new one: what can be read of the old one,
        and what is on the screen."""
        from leankv_app.store.recovery import begin_anew

        try:
            recovered = begin_anew(self.paths.database)
            self.chat.move_to(Store(self.paths.database))
        except (OSError, StoreError) as error:
            self.chat_screen.say_error("Chats", str(error))
            return False
        self.run_worker(self.chat_screen.note(recovered.line))
        return True

    def change_settings(self, changed: Settings) -> None:
        """Use and save other settings."""
        before, self.settings = self.settings, changed
        self.chat.settings = replace(changed, kv=self.chat.kv, system=self.chat.system)
        if changed.theme in self.available_themes:
            self.theme = changed.theme
        if changed.panel != before.panel:
            self.chat_screen.show_panel(changed.panel)
        if problem := configuration.save(self.paths.settings, changed):
            self.notify(problem, severity="error")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Nothing happens to a chat that a dialog covers."""
        return not (action in _OF_CHAT and isinstance(self.screen, ModalScreen))

    # Actions: the chat's screen does the work.

    def action_help(self) -> None:
        """Keys and commands."""
        self.chat_screen.slash.help("")

    def action_stop(self) -> None:
        """Stop the reply."""
        self.chat_screen.stop()

    async def action_new_chat(self) -> None:
        """A new chat."""
        await self.chat_screen.new_chat()

    def action_sessions(self) -> None:
        """Saved sessions."""
        self.chat_screen.open_sessions()

    def action_models(self) -> None:
        """Choose a model."""
        self.chat_screen.open_models()

    def action_panel(self) -> None:
        """Show or hide the memory panel."""
        self.chat_screen.toggle_panel()

    def action_focus_panel(self) -> None:
        """Give the panel its keys, or the prompt its own."""
        self.chat_screen.focus_panel()

    def action_settings(self) -> None:
        """Settings."""
        self.chat_screen.open_settings()

    async def action_regenerate(self) -> None:
        """Ask for the last reply again."""
        await self.chat_screen.regenerate()

    async def action_export(self) -> None:
        """Write the chat to a file."""
        await self.chat_screen.slash.export("")

    def action_latest(self) -> None:
        """Jump to the end."""
        self.chat_screen.conversation.latest()

    def action_copy_or_quit(self) -> None:
        """Copy what is selected; twice in a row without a selection leaves."""
        selected = self.screen.get_selected_text() or self.chat_screen.prompt.selected_text
        if selected:
            self.copy_to_clipboard(selected)
            self.notify("copied")
        elif time.monotonic() - self._interrupted < QUIT_SECONDS:
            self.exit()
        else:
            self._interrupted = time.monotonic()
            self.notify("Ctrl+C again to quit", timeout=QUIT_SECONDS)

    async def action_quit(self) -> None:
        """Leave; the chat is saved."""
        self.exit()

    def save_picture(self) -> None:
        """Write the screen to an SVG file."""
        folder = self.paths.exports
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.notify(f"written to {self.save_screenshot(path=str(folder))}")
        except OSError as error:
            self.notify(f"{folder} cannot be written: {error.strerror}", severity="error")

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: Textual's own commands and ours."""
        for command in super().get_system_commands(screen):
            if command.title != "Screenshot":  # its toast is markup around a path
                yield command
        yield SystemCommand(
            "Screenshot",
            "Save a picture of the screen",
            lambda: self.set_timer(0.1, self.save_picture),  # once the palette is gone
        )
        yield SystemCommand("New chat", "The old one stays saved", self.action_new_chat)
        yield SystemCommand("Sessions", "Open a saved chat", self.action_sessions)
        yield SystemCommand("Models", "Choose and load a model", self.action_models)
        yield SystemCommand("Settings", "Theme, sampling, defaults", self.action_settings)
        yield SystemCommand("Memory panel", "Show or hide it", self.action_panel)
        yield SystemCommand("Regenerate", "Ask for the last reply again", self.action_regenerate)
        yield SystemCommand("Export", "Write the chat to Markdown", self.action_export)

    async def on_unmount(self) -> None:
        """Leave nothing unsaved and no thread behind."""
        chat = self.chat
        chat.leave()
        if chat.session and chat.store.saved:
            self.last_words.append(f"saved; continue with: leankv-chat --resume {chat.session}")
        self.engine.close(timeout=3.0)
        if self._recorder is not None:
            self._recorder.close()
        chat.store.close()
        gc.unfreeze()
