"""Conversations in a model's own form, as text and as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from leankv_mlx.errors import ContextLengthError

Message = Mapping[str, str]
"""`role` and `content`, as chat templates want them."""
_PART = 100_000
"""Characters that are made tokens of at once, where only their number counts."""
_CUT_TOKENS = 8
"""A text that is cut has at most so many tokens more than it has as a whole."""


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


def count(tokenizer: Any, text: str) -> int:
    """Tokens of a text. Of a long one a part at a time, so a token or two more for each cut:
    a tokenizer takes 150 bytes for a byte of text, which is gigabytes for a large document."""
    return sum(len(encode(tokenizer, part)) for part in _parts(text))


def estimate(tokenizer: Any, text: str, most: int) -> int | None:
    """About how many tokens a text has if it has more than `most`; None if it may have fewer.

    No more of it is looked at than is needed to know, so it takes little time and memory however
    long the text is.
    """
    if len(text) <= max(most, _PART):  # hardly more tokens than characters: just count them
        return None
    tokens = seen = 0
    for cuts, part in enumerate(_parts(text)):
        tokens += len(encode(tokenizer, part))
        seen += len(part)
        if tokens - cuts * _CUT_TOKENS > most:
            about = round(tokens / seen * len(text))
            return max(most + 1, round(about, 2 - len(str(about))))
    return None


def check_length(tokenizer: Any, text: str, most: int, before: int = 0) -> None:
    """Refuse a text that is far too long, before all of its tokens are made.

    Args:
        most: tokens of the model's context.
        before: tokens in it already.

    Raises:
        ContextLengthError: it does not fit.
    """
    if (about := estimate(tokenizer, text, most - before)) is not None:
        raise ContextLengthError(
            f"the prompt has about {before + about:,} tokens and the model's context {most:,}; "
            "give a part of the text, or use a model with a longer context."
        )


def _parts(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PART):
        yield text[start : start + _PART]


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
