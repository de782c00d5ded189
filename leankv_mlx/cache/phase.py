"""Whether a sequence is in its prompt or in the reply to it: by what whoever reads the prompt says,
and else by the sizes of its updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leankv_mlx.kernels import MAX_DECODE_TOKENS
from leankv_mlx.sparsity.observations import OBSERVED_QUERIES


@dataclass
class Phase:
    """Where a sequence stands, update by update.

    Who reads a prompt tells how many tokens it has. Where nobody does, an update of more than 8
    tokens is one of a prompt, and the second update in a row of the same size up to 8, or 64 tokens
    in such updates, is one of the reply: the last token of a prompt comes alone, or with drafts,
    and so do generated ones.

    Attributes:
        now: "reply" once the whole prompt is in.
        step: the most tokens that are generated at a time.
        waits: of the update on its way: its tokens stay in the window until the next one, as those
            that are generated do.
        bound: of it, too: whether a limit in bytes holds, as it does but in a prompt whose end is
            known.
        longs: updates of more than 8 tokens in a row, this one included.
    """

    now: Literal["prompt", "reply"] = "prompt"
    step: int = MAX_DECODE_TOKENS
    waits: bool = False
    bound: bool = True
    longs: int = 0
    _told: bool = False  # whether somebody tells where the prompt ends
    _to_come: float = 0  # tokens until then
    _last: int = 0  # tokens of the update before
    _few: int = 0  # tokens of the updates of up to 8 in a row

    def begin_prompt(self, tokens: float, step: int) -> None:
        """So many tokens of a prompt come next, and then up to `step` generated ones at a time."""
        self._told, self._to_come, self.step = True, tokens, max(step, MAX_DECODE_TOKENS)
        self.forget()

    def forget(self) -> None:
        """Another prompt begins: what came before does not say where it ends."""
        self.now, self.longs, self._last, self._few = "prompt", 0, 0, 0

    def end_prompt(self) -> None:
        """The whole prompt is in."""
        self.now, self._to_come = "reply", 0

    def leave_prompt(self) -> None:
        """Nobody tells any more: from here on updates speak for themselves."""
        self._told, self._to_come, self.step = False, 0, MAX_DECODE_TOKENS

    def verified(self) -> None:
        """Drafts were verified: no more of the prompt comes, and what came last was a step."""
        self._told, self._to_come, self.step = True, 0, max(self.step, self._last)

    def take(self, tokens: int) -> bool:
        """An update of so many tokens comes; returns whether the prompt ended before it, which
        `end_prompt` then has to say."""
        few, reading = tokens <= MAX_DECODE_TOKENS, self._to_come > 0
        self.bound = not reading
        self.waits = few or (not reading and tokens <= self.step)
        self.longs = 0 if few else self.longs + 1
        self._few = self._few + tokens if few else 0
        follows = tokens == self._last or self._few > OBSERVED_QUERIES
        self._last = tokens
        if reading:
            self._to_come -= tokens
            return False
        if not self.waits:
            self.leave_prompt()  # too many for a step: another prompt, of which nobody told
            self.now = "prompt"
            return False
        return self.now == "prompt" and (self._told or follows)
