"""The messages. The end is followed until the user scrolls up; a chip leads back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.geometry import Spacing
from textual.message import Message as TextualMessage
from textual.widget import Widget
from textual.widgets import Static

from leankv_app.guard import Guarded
from leankv_app.store import Message
from leankv_app.widgets.message import ReplyMessage, UserMessage
from leankv_app.widgets.segment import Segment

REST_SECONDS = 0.1


class Chip(Static):
    """ "Jump to latest"."""

    class Pressed(TextualMessage):
        """The chip was clicked."""

    def on_click(self) -> None:
        self.post_message(self.Pressed())


class Messages(VerticalScroll):
    """The scrolling part."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("end", "app.latest", "Latest", id="chat.latest", show=False)
    ]

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        self._tell()

    def watch_virtual_size(self) -> None:
        self._tell()

    def _tell(self) -> None:
        if isinstance(self.parent, Conversation):
            self.parent.scrolled()


class Conversation(Guarded, Vertical):
    """Messages and the chip."""

    def compose(self) -> ComposeResult:
        yield Messages(id="messages")
        yield Chip("↓ jump to latest (End)", id="chip")

    def on_mount(self) -> None:
        self._resting = False
        self.query_one("#chip").display = False
        self.messages.anchor()

    @property
    def messages(self) -> Messages:
        """The scrolling part."""
        return self.query_one(Messages)

    async def add(self, *widgets: Widget) -> None:
        """Append widgets."""
        await self.messages.mount_all(widgets)

    async def show(self, messages: Sequence[Message]) -> None:
        """Replace everything by the messages of a session."""
        await self.messages.remove_children()
        await self.add(*map(view_of, messages))
        self.latest()

    def latest(self) -> None:
        """Go to the end and follow it."""
        self.messages.anchor()
        self.messages.scroll_end(animate=False)
        self.scrolled()

    @property
    def following(self) -> bool:
        """Whether new text keeps the end in view."""
        area = self.messages
        # While little is there, an anchored end is scrolled to a place above the top.
        return area.max_scroll_y - max(0, area.scroll_y) <= 1

    def scrolled(self) -> None:
        """Show the chip away from the end, and let what is far from view sleep."""
        self.query_one("#chip").display = not self.following
        if not self._resting:
            self._resting = True
            self.set_timer(REST_SECONDS, self._rest)

    def _rest(self) -> None:
        """Segments out of view sleep, those in it and near it are awake."""
        self._resting = False
        view = self.messages.region
        margin = view.height // 3
        near = view.grow(Spacing(margin, 0, margin, 0))
        for segment in self.messages.query(Segment):
            region = segment.region
            if near.y < region.bottom and region.y < near.bottom:
                segment.wake()
            else:
                segment.sleep()

    def on_chip_pressed(self) -> None:
        self.latest()


def view_of(message: Message) -> Widget:
    """The widget of a saved message."""
    if message.role == "user":
        return UserMessage(message.shown or message.text, message.status)
    who = "Summary of the conversation" if message.role == "summary" else "Model"
    return ReplyMessage(message.text, message.status, who)
