"""The two ends of a request: the thread of its connection, and the loop that generates."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

from leankv_mlx.errors import ClientLeftError

_LOOK_S = 0.25
"""How often the thread of a connection looks whether its client is still there."""


class Client(Queue[Any]):
    """What the loop has for a request: mlx-lm's queue of a context, progress, pieces of the reply
    and None at the end, or an error at any time. It also knows whether anybody waits for them.

    Args:
        connection: to the client, None where nobody can leave.

    Attributes:
        left: nobody waits any more; set by the thread of the connection, and read by the loop.
        strict: nothing but an error is taken once nobody waits.
        kept: the context that is put cannot be stopped.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        super().__init__()
        self._connection = connection
        self.left = False
        self.strict = self.kept = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Hand on one more item.

        Raises:
            ClientLeftError: nobody waits for it, and the queue is `strict`.
        """
        if self.left and self.strict and not isinstance(item, Exception):
            raise ClientLeftError("the client has left.")
        if self.kept and hasattr(item, "stop"):
            item.stop = lambda: None
        super().put(item, block, timeout)

    def answers(self, alive: Callable[[], bool]) -> Iterator[Any]:
        """What the loop hands on, as it comes.

        Args:
            alive: whether the loop still runs.

        Raises:
            ClientLeftError: the client has closed the connection.
            RuntimeError: the loop has ended.
        """
        while True:
            try:
                yield self.get(timeout=_LOOK_S)
                continue
            except Empty:
                pass
            if self._has_left():
                self.left = True
                raise ClientLeftError("the client has left.")
            if not alive():
                raise RuntimeError("generation thread died")

    def _has_left(self) -> bool:
        """A connection that is readable and has nothing to read was closed at the other end."""
        if self._connection is None:
            return False
        try:
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            return bool(poll.poll(0)) and not self._connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True
