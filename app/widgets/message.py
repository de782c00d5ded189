"""What is said: the user's messages, replies that stream, and notes of the app."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from leankv_app.segments import segments
from leankv_app.widgets.segment import Segment

_MARKS = {
    "stopped": "stopped",
    "interrupted": "interrupted: the app ended while it was being written",
    "failed": "not answered",
}


class UserMessage(Vertical):
    """The user's words, as typed."""

    def __init__(self, text: str, status: str = "done") -> None:
        super().__init__(classes="message user")
        self._text = text
        self._status = status

    def compose(self) -> ComposeResult:
        yield Static("You", classes="who", markup=False)
        yield Static(self._text, classes="body", markup=False)
        yield Static("", classes="mark", markup=False)

    def on_mount(self) -> None:
        self.mark(self._status)

    def mark(self, status: str) -> None:
        """Show that the message was not answered."""
        _show_mark(self, status)


class ReplyMessage(Vertical):
    """A reply. While it runs, pieces are appended to its last part; at its end that part is parsed
    once as a whole, because what was parsed piece by piece loses text in an open code fence."""

    def __init__(self, text: str = "", status: str = "running", who: str = "Model") -> None:
        super().__init__(classes="message reply")
        self._parts = segments(text)
        self._status = status
        self._who = who
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Static(self._who, classes="who", markup=False)
        with Vertical(classes="body"):
            *whole, last = self._parts
            yield from map(Segment, whole)
            yield Segment(last, live=self._status == "running")
        yield Static("", classes="mark", markup=False)

    def on_mount(self) -> None:
        _show_mark(self, self._status)

    async def on_unmount(self) -> None:
        await self._stop()

    async def write(self, text: str) -> None:
        """Append a piece."""
        parts = segments(self._parts[-1] + text)
        self._parts[-1:] = parts
        last = self._last
        if len(parts) == 1:
            if self._stream is None:
                self._stream = Markdown.get_stream(last.markdown)
            last.text = parts[0]
            await self._stream.write(text)
            return
        await self._stop()
        await last.replace(parts[0])
        last.live = False
        await self.query_one(".body").mount_all(Segment(part, live=True) for part in parts[1:])

    async def finish(self, text: str, status: str) -> None:
        """The whole reply and how it ended."""
        await self._stop()
        shown, self._parts = self._parts, segments(text)
        if shown[:-1] == self._parts[:-1]:
            await self._last.replace(self._parts[-1])
        else:
            body = self.query_one(".body")
            await body.remove_children()
            await body.mount_all(map(Segment, self._parts))
        self._last.live = False
        _show_mark(self, status)

    @property
    def _last(self) -> Segment:
        return self.query(Segment).last()

    async def _stop(self) -> None:
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None


class Notice(Static):
    """A line of the app's own between messages."""

    def __init__(self, text: str, error: bool = False) -> None:
        super().__init__(text, markup=False, classes="notice error" if error else "notice")


def _show_mark(view: Vertical, status: str) -> None:
    text = _MARKS.get(status, "")
    for line in view.query(".mark").results(Static):
        line.update(f"({text})" if text else "")
        line.display = bool(text)
