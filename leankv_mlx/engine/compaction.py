"""A conversation as its summary, by parts where it is too long to be read at once. Imports no mlx.

What does not fit is folded from its beginning: as many messages as fit are summarized, the summary
stands for them, and so on until the rest fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from leankv_mlx.engine.requests import Turn

INSTRUCTION = (
    "Summarize our conversation so far in a few sentences, with every fact, name and number "
    "that a later question may need."
)
SO_FAR = "Summary of our conversation so far:\n{}\n\n"
"""What stands for the messages that were summarized, in front of the next one."""

Turns = Sequence[Turn]
_LEAST = 200
"""Characters of a message that must fit beside the instruction, or there is no use in parts."""


def asked(turns: Turns) -> tuple[Turn, ...]:
    """A conversation and the instruction to summarize it."""
    return merged([*turns, Turn("user", INSTRUCTION)])


def merged(turns: Turns) -> tuple[Turn, ...]:
    """Neighbouring messages of one role as one: templates want them to alternate."""
    found: list[Turn] = []
    for turn in turns:
        if found and found[-1].role == turn.role:
            found[-1] = Turn(turn.role, f"{found[-1].text}\n\n{turn.text}")
        else:
            found.append(turn)
    return tuple(found)


def first_part(
    turns: Turns, fits: Callable[[Turns], bool]
) -> tuple[tuple[Turn, ...], tuple[Turn, ...]] | None:
    """The longest beginning of a conversation that can be summarized at once, and what is left.

    Args:
        turns: from `asked`; a system prompt is part of the beginning and of what is left.
        fits: whether a prompt can be read.

    Returns:
        What to ask, and the turns behind it; None if not even a piece of one message fits.
    """
    system, said = _parts(turns)
    whole = _most(len(said), lambda count: fits(asked([*system, *said[:count]])))
    messages = (asked([*system, *said[:whole]]), tuple(said[whole:])) if whole else None
    if whole > 1 or whole == len(said):
        return messages
    # One message, which may be the summary of what came before, is not enough to get ahead.
    before, turn, rest = said[:whole], said[whole], said[whole + 1 :]

    def with_piece(length: int) -> tuple[Turn, ...]:
        return asked([*system, *before, Turn(turn.role, turn.text[:length])])

    length = _most(len(turn.text), lambda length: fits(with_piece(length)))
    if length < min(_LEAST, len(turn.text)):
        return messages
    length = _between_words(turn.text, length)
    return with_piece(length), (Turn(turn.role, turn.text[length:]), *rest)


def folded(turns: Turns, summary: str, rest: Turns) -> tuple[Turn, ...]:
    """The conversation to summarize once `summary` stands for all but `rest`."""
    system, _ = _parts(turns)
    return asked([*system, Turn("user", SO_FAR.format(summary.strip()).rstrip()), *rest])


def _parts(turns: Turns) -> tuple[list[Turn], list[Turn]]:
    """The system prompt, and what was said before the instruction."""
    *before, last = turns
    open_question = last.text.removesuffix(INSTRUCTION).rstrip()
    said = [*before, Turn("user", open_question)] if open_question else before
    system = [turn for turn in said[:1] if turn.role == "system"]
    return system, said[len(system) :]


def _between_words(text: str, length: int) -> int:
    """Where to cut, at most at `length`: a number that is cut says something else."""
    near = length - _LEAST // 2
    if length == len(text):
        return length
    return max(text.rfind(" ", near, length), text.rfind("\n", near, length)) + 1 or length


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` that fits, 0 if none does."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
