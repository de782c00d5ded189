"""A conversation that is full can be compacted, always."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.engine.test_engine import Driver, document  # isort: skip

from leankv_mlx.engine.compaction import INSTRUCTION, SO_FAR, asked, first_part, folded, merged
from leankv_mlx.engine.events import Done, Failed, Loaded, Prefill
from leankv_mlx.engine.requests import Load, Reply, Turn


def ask(driver: Driver, request: Reply) -> Done | Failed:
    driver.engine.submit(request)
    while True:
        event = driver._queue.get(timeout=120)
        if isinstance(event, Done | Failed) and event.request == request.request:
            return event


@pytest.mark.parametrize(("kv", "budget"), [("leankv", 800_000), ("none", 1_500_000)])
def test_a_full_conversation_is_compacted_and_goes_on(kv: str, budget: int) -> None:
    """Kind: refused for ever. Turn after turn until a question is refused with "compact it"."""
    driver = Driver()
    driver.engine.submit(Load(kv=kv, budget=budget))
    driver.wait(Loaded)
    said: list[Turn] = []
    for number in range(1, 60):
        turns = [*said, Turn("user", f"{number}. {document(8)}")]
        ended = ask(driver, Reply(number, tuple(turns), max_tokens=24))
        if isinstance(ended, Failed):
            assert "/compact makes room" in ended.message
            break
        assert driver.snapshot().used <= budget
        said = [*turns, Turn("assistant", driver.text(number))]
    else:
        raise AssertionError("the budget was never full")
    assert len(said) > 2
    ended = ask(driver, Reply(100, asked(said), max_tokens=64, summary=True))
    assert isinstance(ended, Done), ended
    summary = driver.text(100)
    assert driver.snapshot().used <= budget
    question = f"{SO_FAR.format(summary)}{document(8)}"
    ended = ask(driver, Reply(101, (Turn("user", question),), max_tokens=24))
    assert isinstance(ended, Done), ended
    driver.engine.close()


def test_a_conversation_of_another_budget_is_compacted_by_parts() -> None:
    """Kind: refused for ever: a session that is resumed where much less fits."""
    driver = Driver()
    driver.engine.submit(Load(budget=600_000))
    driver.wait(Loaded)
    said = [Turn("user", document(60)), Turn("assistant", "Yes."), Turn("user", document(40)),
            Turn("assistant", "No."), Turn("user", "And now?")]  # fmt: skip
    assert isinstance(ask(driver, Reply(1, tuple(said))), Failed)
    ended = ask(driver, Reply(2, asked(said), max_tokens=32, summary=True))
    assert isinstance(ended, Done), ended
    totals = {event.total for event in driver.events if isinstance(event, Prefill)}
    assert len(totals) > 2  # parts
    driver.engine.close()


def test_what_reuse_cuts_is_not_counted() -> None:
    """Kind: bytes that are about to be given back are counted as needed. The first reply takes all
    there is; the question after it shares nothing with it."""
    driver = Driver()
    driver.engine.submit(Load(budget=500_000))
    driver.wait(Loaded)
    one = ask(driver, Reply(1, (Turn("user", "Hello"),), max_tokens=4000))
    assert isinstance(one, Done)
    assert one.tokens > 300
    other = ask(driver, Reply(2, (Turn("user", document(4)),), max_tokens=4))
    assert isinstance(other, Done), other
    assert other.reused < 10
    driver.engine.close()


def test_exact_rows_count_in_what_a_reply_may_take() -> None:
    """Kind: a token's cost counted without the rows that are not compressed yet."""
    budget = 500_000
    driver = Driver()
    driver.engine.submit(Load(budget=budget))
    driver.wait(Loaded)
    driver.engine.submit(Reply(1, (Turn("user", "Hello"),), max_tokens=4000))
    driver.wait(Done)
    assert driver.snapshot().used <= budget
    driver.engine.close()


def fits(most: int) -> object:
    return lambda turns: sum(len(turn.text) for turn in turns) <= most


@pytest.mark.parametrize("most", [600, 1200, 3000])
def test_parts_hold_everything_that_was_said(most: int) -> None:
    """Kind: text that is lost at a cut."""
    system = Turn("system", "Be brief.")
    said = [Turn("user", "a " * 700), Turn("assistant", "b " * 200), Turn("user", "c 12345 " * 90)]
    turns, read = asked([system, *said]), ""
    for _ in range(40):
        if fits(most)(turns):  # type: ignore[operator]
            break
        part = first_part(turns, fits(most))  # type: ignore[arg-type]
        assert part is not None
        head, rest = part
        assert fits(most)(head)  # type: ignore[operator]
        assert head[0] == system
        read += words(head)
        turns = folded(turns, "S", rest)
    else:
        raise AssertionError("no end")
    assert (read + words(turns)).split() == "".join(turn.text + " " for turn in said).split()


def words(turns: Sequence[Turn]) -> str:
    """What was said, without what was put around it."""
    text = " ".join(turn.text for turn in turns[1:])
    return text.replace(INSTRUCTION, "").replace(SO_FAR.format("S").rstrip(), "") + " "


def test_nothing_fits() -> None:
    """Kind: a loop without an end."""
    assert first_part(asked([Turn("user", "a" * 900)]), lambda turns: False) is None
    assert merged([]) == ()
