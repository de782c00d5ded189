"""A part of a reply that takes itself out of the layout while it is far from view.

Textual lays out every widget of a screen whenever one of them grows, and Markdown makes many. A
segment that sleeps is one empty widget of the same height.
"""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown

from leankv_app.markdown import parser


class Segment(Vertical):
    """Shows `text` as Markdown.

    Attributes:
        live: it still grows, and never sleeps.
    """

    def __init__(self, text: str, live: bool = False) -> None:
        super().__init__(classes="segment")
        self.text = text
        self.live = live
        self.asleep = False

    def compose(self) -> ComposeResult:
        yield self._view()

    @property
    def markdown(self) -> Markdown:
        """The widget with the text; only while it is awake."""
        return self.query_one(Markdown)

    async def replace(self, text: str) -> None:
        """Show another text."""
        self.text = text
        if not self.asleep:
            await self.markdown.update(text)

    def sleep(self) -> None:
        """Keep the height, drop the content."""
        if self.asleep or self.live or not self.size.height:
            return
        self.asleep = True
        self.styles.height = self.size.height
        self.remove_children()

    def wake(self) -> None:
        """Show the content again."""
        if self.asleep:
            self.asleep = False
            self.styles.height = "auto"
            self.mount(self._view())

    def _view(self) -> Markdown:
        return Markdown(self.text, parser_factory=parser, open_links=False)
