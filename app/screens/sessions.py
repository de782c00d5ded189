"""Saved sessions: open, rename, delete."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from leankv_app.format import counted
from leankv_app.guard import Guarded
from leankv_app.screens.dialog import ConfirmDialog, TextDialog
from leankv_app.store import SessionInfo, StoreError

if TYPE_CHECKING:
    from leankv_app.screens.chat import ChatScreen


class SessionsScreen(Guarded, ModalScreen[SessionInfo | None]):
    """Gives the session to open.

    Args:
        load: the sessions now.
        rename, delete: change one.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="sessions.close"),
        Binding("r", "rename", "Rename", id="sessions.rename"),
        Binding("d", "delete", "Delete", id="sessions.delete"),
    ]

    def __init__(
        self,
        load: Callable[[], Sequence[SessionInfo]],
        rename: Callable[[SessionInfo, str], None],
        delete: Callable[[SessionInfo], None],
    ) -> None:
        super().__init__()
        self._load = load
        self._rename = rename
        self._delete = delete
        self._sessions: Sequence[SessionInfo] = ()

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog large") as box:
            box.border_title = "Sessions"
            yield OptionList(id="list", markup=False)
            yield Static("Enter open · r rename · d delete · Esc close", classes="hint")

    def on_mount(self) -> None:
        self._fill()

    def _fill(self) -> None:
        self._sessions = self._load()
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(_line(info)) for info in self._sessions])
        if not self._sessions:
            options.add_option(Option("nothing is saved yet", disabled=True))
        else:
            options.highlighted = 0
        options.focus()

    @property
    def _chosen(self) -> SessionInfo | None:
        index = self.query_one(OptionList).highlighted
        return None if index is None or not self._sessions else self._sessions[index]

    def on_option_list_option_selected(self) -> None:
        self.dismiss(self._chosen)

    def action_rename(self) -> None:
        """Ask for a title."""
        if (info := self._chosen) is None:
            return

        def done(title: str | None) -> None:
            if title:
                self._rename(info, title)
                self._fill()

        self.app.push_screen(TextDialog("Rename", info.title), done)

    def action_delete(self) -> None:
        """Ask, then delete."""
        if (info := self._chosen) is None:
            return

        def done(yes: bool | None) -> None:
            if yes:
                self._delete(info)
                self._fill()

        length = counted(info.messages, "message")
        text = f"Delete “{info.title}” with {length}? This cannot be undone."
        self.app.push_screen(ConfirmDialog("Delete", text, "Delete"), done)


def sessions_of(screen: ChatScreen) -> SessionsScreen:
    """The sessions of a chat's store; what cannot be read or changed is said."""
    chat, store = screen.chat, screen.chat.store

    def safely(work: Callable[[], None]) -> None:
        try:
            work()
        except StoreError as error:
            screen.say_error("Chats", str(error))

    def load() -> Sequence[SessionInfo]:
        found: list[SessionInfo] = []
        safely(lambda: found.extend(store.sessions()))
        return found

    def rename(info: SessionInfo, title: str) -> None:
        if info.id == chat.session:
            chat.rename(title)
            screen.show_title()
        else:
            safely(lambda: store.change(info.id, title=title))

    def delete(info: SessionInfo) -> None:
        if info.id == chat.session:
            screen.run_worker(screen.new_chat())
        safely(lambda: store.delete(info.id))

    return SessionsScreen(load, rename, delete)


def _line(info: SessionInfo) -> Content:
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.updated))
    busy = " · open in another window" if info.busy else ""
    return Content.assemble(
        (f"{info.id:>4} ", "dim"),
        info.title,
        (f"  {date} · {counted(info.messages, 'message')}{busy}", "dim"),
    )
