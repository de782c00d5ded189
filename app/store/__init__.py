"""Chats in SQLite: never lost, whatever happens to the process or the disk."""

from leankv_app.store.database import StoreError
from leankv_app.store.sessions import TITLE_LENGTH, Message, SessionInfo, Store

__all__ = ["TITLE_LENGTH", "Message", "SessionInfo", "Store", "StoreError"]
