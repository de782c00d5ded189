"""Conversations in a model's own form, as text and as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
"""`role` and `content`, as chat templates want them."""


def render(tokenizer: Any, messages: Sequence[Message], **template: Any) -> str:
    """Messages up to where the model's reply begins.

    Args:
        template: further variables of the chat template.
    """
    if not tokenizer.has_chat_template:
        said = (f"{message['role']}: {message['content']}" for message in messages)
        return "\n".join([*said, "assistant:"])
    text: str = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=False,
        **template,
    )
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a rendered text; the template has added what is special."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def beginning(tokens_of: Callable[[str], Sequence[int]], text: str) -> list[int]:
    """Tokens that a prompt begins with, whatever is added to `text`.

    Args:
        tokens_of: the whole prompt for a text that goes into it.
    """
    one, other = tokens_of(text + "A"), tokens_of(text + "?")
    return list(one[: shared(one, other)])


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
