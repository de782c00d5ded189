"""Where the user types: history, completion of commands, Enter to send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textual import events
from textual.message import Message
from textual.strip import Strip
from textual.widgets import TextArea

from leankv_app.guard import Guarded

Complete = Callable[[str], Sequence[str]]


class Prompt(Guarded, TextArea):
    """Enter sends, Shift+Enter or Ctrl+J begins a new line, Up and Down on the first and last
    line go through what was sent before, Tab completes."""

    @dataclass
    class Submitted(Message):
        """The user sent a text."""

        text: str

    @dataclass
    class Completions(Message):
        """What Tab would offer now; `chosen` is the one it would take."""

        choices: Sequence[str]
        chosen: int

    @dataclass
    class Scroll(Message):
        """The conversation should scroll by pages."""

        pages: int

    def __init__(self, complete: Complete, history: Sequence[str] = ()) -> None:
        super().__init__(
            id="prompt",
            placeholder="Ask something, or / for commands",
            compact=True,
            highlight_cursor_line=False,
            soft_wrap=True,
        )
        self._complete = complete
        self._history = list(history)
        self._at = len(self._history)
        self._draft = ""
        self._choices: Sequence[str] = ()
        self._chosen = 0

    def remember(self, text: str) -> None:
        """Put a text at the end of the history."""
        if not self._history or self._history[-1] != text:
            self._history.append(text)
        self._at = len(self._history)

    def render_line(self, y: int) -> Strip:
        """A line; TextArea divides by the width, which is 0 in the smallest terminals."""
        return super().render_line(y) if self.content_size.width > 0 else Strip([])

    def on_text_area_changed(self) -> None:
        self._chosen = 0
        # What came from the history is complete, and Up and Down go on through it.
        recalled = self._at < len(self._history) and self.text == self._history[self._at]
        offers = self.text.startswith("/") and not recalled
        self._offer(self._complete(self.text) if offers else ())

    async def _on_key(self, event: events.Key) -> None:
        actions: dict[str, Callable[[], bool]] = {
            "enter": self._submit,
            "shift+enter": self._newline,
            "ctrl+j": self._newline,
            "tab": self._take,
            "up": self._up,
            "down": self._down,
            "pageup": lambda: self._page(-1),
            "pagedown": lambda: self._page(1),
        }
        action = actions.get(event.key)
        if action is not None and action():
            event.prevent_default()
            event.stop()
            return
        await super()._on_key(event)

    def _submit(self) -> bool:
        text = self.text.strip()
        if self._choices and " " not in text and text not in self._choices:
            return self._take()
        if text:
            self.remember(text)
            self.text = ""
            self.post_message(self.Submitted(text))
        return True

    def _newline(self) -> bool:
        self.insert("\n")
        return True

    def _take(self) -> bool:
        if self._choices:
            self._set(self._choices[self._chosen])
        return True  # Tab never leaves the prompt in the middle of a word

    def _up(self) -> bool:
        if self._choices:
            return self._choose(-1)
        return self.cursor_location[0] == 0 and self._go(-1)

    def _down(self) -> bool:
        if self._choices:
            return self._choose(1)
        return self.cursor_location[0] == self.document.line_count - 1 and self._go(1)

    def _page(self, pages: int) -> bool:
        self.post_message(self.Scroll(pages))
        return True

    def _choose(self, step: int) -> bool:
        self._chosen = (self._chosen + step) % len(self._choices)
        self.post_message(self.Completions(self._choices, self._chosen))
        return True

    def _go(self, step: int) -> bool:
        at = self._at + step
        if not 0 <= at <= len(self._history):
            return False
        if self._at == len(self._history):
            self._draft = self.text
        self._at = at
        self._set(self._draft if at == len(self._history) else self._history[at])
        return True

    def _set(self, text: str) -> None:
        self.text = text
        self.move_cursor(self.document.end)

    def _offer(self, choices: Sequence[str]) -> None:
        self._choices = choices
        self.post_message(self.Completions(choices, self._chosen))
