"""A model that is loaded, and the conversation with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import Opener
from leankv_mlx.engine.conversation import Conversation
from leankv_mlx.engine.recoding import can_become, recoded
from leankv_mlx.engine.requests import Turn
from leankv_mlx.engine.room import Room
from leankv_mlx.errors import ContextLengthError
from leankv_mlx.mlx_lm.attachment import Attachment, attach, backend_of, make_caches, why_not
from leankv_mlx.mlx_lm.context import context_length, longest_context
from leankv_mlx.mlx_lm.footprint import Footprint, spare_memory
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.reading import Pace
from leankv_mlx.mlx_lm.usage import measure


@dataclass
class Session:
    """What a reply needs. The attachment is active until `close`.

    Attributes:
        model: what was asked for when it was loaded.
        attachment: None without compression.
        opener: of documents.
        pace: how often a prompt that is read may be stopped.
    """

    model: str
    loaded: LoadedModel
    attachment: Attachment | None
    conversation: Conversation
    opener: Opener
    room: Room
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def begin(
        cls,
        model: str,
        loaded: LoadedModel,
        config: CompressionConfig | None,
        budget: int,
        store: DocumentCache,
    ) -> Session:
        """Attach to a model and begin an empty conversation.

        Args:
            budget: bytes that the caches may take; 0 for what the machine has to spare.

        Raises:
            LeanKVError: it does not go with this compression.
        """
        attachment = attach(loaded.model, config) if config else None
        budget = budget or spare_memory(loaded.model)
        footprint = Footprint.of(loaded.model, attachment)
        room = Room(budget, footprint, context_length(loaded.config) or 0)
        if attachment is not None:
            attachment.start()
        try:
            mx.eval(loaded.model(mx.array([[1]]), cache=make_caches(loaded.model)))  # warms kernels
            conversation = Conversation(loaded.model, loaded.tokenizer)
        except BaseException:
            if attachment is not None:
                attachment.stop()
            raise
        opener = Opener(loaded, attachment.config if attachment else None, store)
        return cls(model, loaded, attachment, conversation, opener, room)

    def close(self) -> None:
        """Leave the model as it was."""
        if self.attachment is not None:
            self.attachment.stop()

    @property
    def compressed(self) -> int:
        """How many entries of the cache list are compressed."""
        return self.attachment.compressed_layers if self.attachment else 0

    @property
    def backend(self) -> str:
        """What runs the kernels, "none" without compression."""
        return backend_of(self.attachment)

    @property
    def weights_read(self) -> float:
        """Share of the layers' weights that the last step read."""
        return self.attachment.weights_read if self.attachment else 1.0

    @property
    def why_not(self) -> str:
        """Why nothing is compressed; "" where something is."""
        return why_not(self.attachment)

    def check_length(self, turns: Sequence[Turn]) -> None:
        """Refuse what is far too long before all of its tokens are made.

        Raises:
            ContextLengthError: it has clearly more tokens than the model was made for.
        """
        self.conversation.check_length(turns, longest_context(self.loaded.config))

    def limit(self, prompt: Sequence[int], limit: int) -> int:
        """How long the reply to a prompt may be whose beginning, and nothing else, is cached.

        Raises:
            ContextLengthError: the prompt does not fit the model or the memory budget.
        """
        tokens, room = len(prompt), self.room
        if room.context and tokens >= room.context:
            raise ContextLengthError(
                f"the conversation has {tokens} tokens and the model's context {room.context}; "
                "/compact makes room, or begin a new chat."
            )
        held = measure(self.conversation.caches)
        spare = room.longest(held) - tokens
        if spare <= 0:
            raise ContextLengthError(
                f"the conversation needs {room.needed(held, tokens) / 1e6:.1f} MB of KV cache and "
                f"the budget is {room.budget / 1e6:.1f} MB; /compact makes room, or begin a new "
                "chat."
            )
        return min(limit, spare)

    def recode(self, config: CompressionConfig | None) -> bool:
        """Go on with another compression; False if the cache could not be turned into it and was
        dropped, so that the conversation has to be read again.

        Raises:
            LeanKVError: the model does not go with it; everything is as it was.
        """
        conversation, model = self.conversation, self.loaded.model
        attachment = attach(model, config) if config else None
        footprint = Footprint.of(model, attachment)
        config = attachment.config if attachment else None  # with the digest of its mask
        self.close()
        self.attachment = attachment
        if attachment is not None:
            attachment.start()
        self.opener = replace(self.opener, config=config)
        self.room = replace(self.room, footprint=footprint)
        old, tokens = conversation.caches, conversation.tokens
        kept = all(can_become(cache, config) for cache in old)
        conversation.forget_cache()
        if kept:
            fresh = make_caches(model)
            conversation.caches = [recoded(*pair) for pair in zip(old, fresh, strict=True)]
            conversation.tokens = tokens
        mx.clear_cache()
        return kept or not tokens
