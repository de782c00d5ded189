"""The index arithmetic of rewriting a tier, beside lists of tokens that are moved one by one."""

from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from leankv_mlx.cache import moves
from leankv_mlx.cache.moves import in_front, plan_move, taken

BLOCK = 4
NOTHING = -1

Heads = list[list[tuple[int, bool]]]
"""Of each head its slots: the token in it, and whether it stays (or comes)."""


@st.composite
def tiers(draw: st.DrawFn) -> tuple[Heads, Heads]:
    """Ragged heads with some slots that stay, and blocks that come, padded anywhere."""
    heads = draw(st.integers(1, 4))
    # All stay in some heads and none in others, or no block would be left where it is.
    some = st.sampled_from([st.just(True), st.just(False), st.booleans()])

    def slots(head: int, kind: int, count: int) -> list[tuple[int, bool]]:
        flags = draw(st.lists(draw(some), min_size=count, max_size=count))
        return [(1000 * head + 100 * kind + i, flag) for i, flag in enumerate(flags)]

    old = [slots(h, 0, draw(st.integers(0, 5 * BLOCK))) for h in range(heads)]
    width = BLOCK * draw(st.integers(0, 2))
    return old, [slots(h, 1, width) for h in range(heads)]


def padded(heads: Heads, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flags [H, width]."""
    tokens = np.full((len(heads), width), NOTHING)
    flags = np.zeros((len(heads), width), bool)
    for h, slots in enumerate(heads):
        for i, (token, flag) in enumerate(slots):
            tokens[h, i], flags[h, i] = token, flag
    return tokens, flags


@given(tiers())
def test_a_move_is_that_of_lists(case: tuple[Heads, Heads]) -> None:
    old, new = case
    lengths = np.array([len(slots) for slots in old], np.int32)
    width = BLOCK * -(-int(lengths.max()) // BLOCK)
    tokens, keep = padded(old, width)
    coming, comes = padded(new, len(new[0]))

    move = plan_move(lengths, keep, comes, BLOCK)

    blocks = tokens.reshape(len(old), -1, BLOCK)
    for h in range(len(old)):
        wanted = [t for t, flag in [*old[h], *new[h]] if flag]
        at = int(move.fixed[h])
        assert all(flag for _, flag in old[h][: at * BLOCK])
        after = old[h][at * BLOCK :][:BLOCK]
        assert len(after) < BLOCK or not all(flag for _, flag in after)  # no more can be left
        loose = [*blocks[h][move.behind[h]].ravel(), *coming[h]]
        picked = [loose[i] for i in move.picked[h] if i >= 0]
        assert [*tokens[h, : at * BLOCK], *picked] == wanted
        assert len(picked) == move.counts[h] == (move.picked[h] >= 0).sum()
        assert (move.picked[h, : len(picked)] >= 0).all()
        assert np.concatenate([tokens, coming], axis=1)[h][move.order[h]].tolist() == wanted


@given(tiers())
def test_chosen_slots_in_front(case: tuple[Heads, Heads]) -> None:
    old, _ = case
    tokens, chosen = padded(old, max(map(len, old)))
    index, counts = in_front(chosen)
    found = taken(tokens, index, index >= 0)
    assert index.shape == (len(old), counts.max(initial=0))
    for h, slots in enumerate(old):
        wanted = [token for token, flag in slots if flag]
        assert found[h].tolist() == wanted + [0] * (index.shape[1] - len(wanted))


def test_the_example_is_what_happens() -> None:
    assert doctest.testmod(moves, raise_on_error=True).attempted > 0
