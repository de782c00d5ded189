"""The model that a server answers with, and what its caches take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.codec.format import TILE
from leankv_mlx.mlx_lm.attachment import Attachment, own_caches
from leankv_mlx.mlx_lm.footprint import Footprint, spare_memory
from leankv_mlx.serving.prefixes import Prefixes


@dataclass(frozen=True)
class Served:
    """One model.

    Attributes:
        name: mlx-lm's `ModelDescription`, as a request names it.
        key: what the store of prompts calls it.
        config: the content of its config.json.
        vocabulary: tokens that it gives logits for.
        footprints: of its caches, and of those of the model that drafts for it.
        limit: bytes that the caches of all requests may take.
        window: the most exact rows that a sequence has of what it read last.
        facts: about it, for whoever asks the server.
        disk: where prefixes of its prompts survive a restart.
    """

    name: Any
    key: Any
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    vocabulary: int
    footprints: tuple[Footprint, ...]
    limit: int
    window: int
    facts: dict[str, Any]
    disk: Prefixes | None = None

    @classmethod
    def of(
        cls,
        name: Any,
        provider: Any,
        config: dict[str, Any],
        attachments: tuple[Attachment, ...],
        limit: int | None,
        disk: Prefixes | None = None,
    ) -> Served:
        """What mlx-lm's `ModelProvider` has loaded.

        Args:
            attachments: of the model, and of the one that drafts.
            limit: None for the share of this machine's memory that is left beside the model.
            disk: see `Served`.
        """
        model = provider.model
        logits = model(mx.array([[1]]), cache=own_caches(model))  # whose shape is all that is read
        models = [m for m in (model, provider.draft_model) if m is not None]
        limit = spare_memory(model) if limit is None else limit
        first = attachments[0]
        return cls(
            name=name,
            key=provider.model_key,
            model=model,
            tokenizer=provider.tokenizer,
            config=config,
            vocabulary=int(logits.shape[-1]),
            footprints=tuple(map(Footprint.of, models, attachments)),
            limit=limit,
            window=first.config.window + TILE,
            facts={
                "model": str(provider.model_key[0]),
                "setting": first.config.spec(),
                "backend": first.backend,
                "layers": {"compressed": first.compressed_layers, "all": len(first.report)},
                "limit": limit * first.machines,
                **({"machines": first.machines} if first.machines > 1 else {}),
            },
            disk=disk,
        )

    def most(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` tokens takes at most."""
        return sum(footprint.most(tokens) for footprint in self.footprints)

    def used(self, tokens: int) -> int:
        """Bytes that one takes once it was read."""
        return sum(footprint.used(tokens) for footprint in self.footprints)

    def own(self, tokens: int, since: int) -> int:
        """Bytes of such a sequence that will not come on top, `since` tokens after a copy of it was
        made: until its window has passed that place, exact rows are the copy's, too."""
        return self.used(tokens) if since > self.window else self.shared(tokens)

    def shared(self, tokens: int) -> int:
        """Bytes of its first tokens that whoever goes on from them does not take again."""
        return sum(footprint.shared(tokens) for footprint in self.footprints)

    def sequences(self, tokens: int) -> tuple[int, int]:
        """How many sequences of `tokens` tokens fit, and how many would uncompressed."""
        own = sum(footprint.uncompressed(tokens) for footprint in self.footprints)
        return self.limit // max(1, self.most(tokens)), self.limit // max(1, own)
