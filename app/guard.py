"""Where an error that nobody expected ends: as one line in the chat, which goes on.

Textual ends the app at the first exception that leaves a handler, and prints it with the values of
all variables. It has no public way to go on, so what is ours goes through `Guarded`, which stands
around the one method that every message of a screen or widget comes by, keys included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual.message import Message
from textual.message_pump import MessagePump

if TYPE_CHECKING:
    from leankv_app.app import ChatApp


class Guarded(MessagePump):
    """To be named before Textual's class."""

    async def _dispatch_message(self, message: Message) -> None:
        try:
            await super()._dispatch_message(message)
        except Exception as error:
            await cast("ChatApp", self.app).tell(error)
