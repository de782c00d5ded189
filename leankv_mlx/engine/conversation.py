"""The cache of a conversation and the tokens that are in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx import nn

from leankv_mlx.cache import Sequences
from leankv_mlx.engine.requests import Turn
from leankv_mlx.mlx_lm import prompts
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.usage import measure


class Conversation:
    """Caches, and the tokens that they hold: `tokens` is the truth about every offset.

    A reply is kept as the tokens that were generated. Its text may be cut into tokens in another
    way, so a prompt that continues the text of what is known keeps those tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.caches: list[Any] = make_caches(model)
        self.tokens: list[int] = []
        self._text = ""  # what _known says, as text
        self._known: list[int] = []

    def forget(self) -> None:
        """Empty the cache."""
        self.caches = make_caches(self._model)
        self.tokens, self._known, self._text = [], [], ""

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of the conversation up to where the model has to go on."""
        known, rest = self._known_part(self.render(turns))
        return known + self._encode(rest) if rest else known

    def check_length(self, turns: Sequence[Turn], most: int) -> None:
        """Refuse what is far too long before all of its tokens are made; see `prompts`.

        Raises:
            ContextLengthError: it has clearly more than `most` tokens.
        """
        known, rest = self._known_part(self.render(turns))
        prompts.check_length(self._tokenizer, rest, most, len(known))

    def _known_part(self, text: str) -> tuple[list[int], str]:
        """The tokens that a conversation is known to begin with, and the text after them."""
        if self._text and text.startswith(self._text):
            return list(self._known), text[len(self._text) :]
        return [], text

    def beginning(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens that the conversation begins with, whatever is added to its last message."""
        *before, last = turns
        return prompts.beginning(
            lambda text: self.prompt([*before, Turn(last.role, text)]), last.text
        )

    def render(self, turns: Sequence[Turn]) -> str:
        """The conversation in the model's own form."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return prompts.render(self._tokenizer, messages)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to what it shares with `prompt`; returns how many tokens it keeps.

        At least one token of the prompt is left to read.
        """
        shared = prompts.shared(self.tokens, prompt)
        keep = min(shared, len(prompt) - 1)
        if keep < len(self.tokens) and not Sequences.of(self.caches).is_prefix(shared):
            keep = 0  # what a policy kept of another prompt does not answer this one
        self._cut(keep)
        return len(self.tokens)

    def settle(self, prompt: Sequence[int], reply: Sequence[int]) -> None:
        """After a generation, however it ended: the caches and `tokens` agree again."""
        known = [*prompt, *reply]
        offsets = {measure([cache]).tokens for cache in self.caches} - {0}
        if not offsets:
            self._cut(0)
            return
        held = max(offsets)
        if len(offsets) > 1:  # stopped between layers
            self.forget()
            return
        self.tokens = known[:held]
        if held > len(known):
            self.tokens = [*known, *[-1] * (held - len(known))]
            self._cut(len(known))

    def remember(self, prompt: Sequence[int], turns: Sequence[Turn], reply: str,
                 tokens: Sequence[int]) -> None:  # fmt: skip
        """What the text of a prompt and its reply are in tokens."""
        self._text = self.render(turns) + reply
        self._known = [*prompt, *tokens]

    def _cut(self, keep: int) -> None:
        """Remove the end of the caches, or everything where that is impossible."""
        surplus = len(self.tokens) - keep
        if surplus <= 0:
            return
        # A policy may have looked at what goes now, but that was no other prompt.
        if keep == 0 or not Sequences.of(self.caches).can_rewind():
            self.forget_cache()
            return
        for cache in self.caches:
            cache.trim(surplus)
        self.tokens = self.tokens[:keep]

    def forget_cache(self) -> None:
        """Empty the cache, but keep what replies are in tokens."""
        self.caches = make_caches(self._model)
        self.tokens = []

    def _encode(self, text: str) -> list[int]:
        return prompts.encode(self._tokenizer, text)
