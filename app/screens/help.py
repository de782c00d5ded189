"""Keys and commands."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown

_TEXT = """\
## Keys
| key | |
|---|---|
| Enter | send |
| Shift+Enter, Ctrl+J | new line |
| Up, Down | what was sent before |
| Tab | complete a command |
| PageUp, PageDown | scroll |
| End | jump to the latest |
| Esc | stop the reply |
| Ctrl+C | copy the selection; twice to quit |
| Ctrl+Q | quit |
| Ctrl+P | command palette |
| Ctrl+N | new chat |
| Ctrl+S | sessions |
| Ctrl+O | models |
| Ctrl+B | memory panel |
| F2 | into the panel: `v` map or gauges, `d` details |
| F3 | settings |
| Ctrl+R | regenerate the reply |
| Ctrl+E | export to Markdown |
| F1 | this help |

## Commands
{commands}
"""


class HelpScreen(ModalScreen[None]):
    """The help."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,q", "dismiss", "Close", id="help.close")
    ]

    def __init__(self, commands: dict[str, str]) -> None:
        super().__init__()
        rows = "\n".join(f"| {name} | {about} |" for name, about in commands.items())
        self._text = _TEXT.format(commands=f"| command | |\n|---|---|\n{rows}")

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog large") as box:
            box.border_title = "Help"
            yield Markdown(self._text)
