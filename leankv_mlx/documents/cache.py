"""Documents that were read before: entries of the folder where a server's prompts are kept, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leankv_mlx.mlx_lm.stored_prompts import StoredPrompts
from leankv_mlx.serving.keys import Key


class DocumentCache(StoredPrompts):
    """The folder as documents see it.

    What follows a document never depends on whether it was read or opened, so only entries that
    were kept as documents are opened: the prefix of a prompt may be what was left of a longer one.
    """

    def load(
        self, key: Key, name: str, fresh: Sequence[Any], documents: bool = True
    ) -> list[Any] | None:
        """The caches of a document, None if they are to be made; see `Entries.load`."""
        return super().load(key, name, fresh, documents)
