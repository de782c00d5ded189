"""The retrieval tasks: length, splits, depth and score, with a word counter for a tokenizer."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv_mlx.evaluation import prose, tasks
from leankv_mlx.evaluation.prose import Split

TEMPLATE_WORDS = 5


def count(turn: str) -> int:
    """Words, and some for a chat template."""
    return len(turn.split()) + TEMPLATE_WORDS


def make(name: str, length: int = 600, depth: float | None = None, seed: int = 0) -> tasks.Sample:
    return tasks.TASKS[name].make(tasks.seeded("test", name, seed), length, count, depth)


def sample_of(*answers: str) -> tasks.Sample:
    return tasks.Sample("", "", answers)


def test_the_tasks_are_those_of_the_plan() -> None:
    assert list(tasks.TASKS) == ["S1", "S2", "MK1", "MK2", "MV", "MQ", "VT", "FWE"]
    assert all(name == task.name and task.description for name, task in tasks.TASKS.items())


@pytest.mark.parametrize("name", tasks.TASKS)
def test_samples_are_deterministic(name: str) -> None:
    assert make(name) == make(name)
    assert make(name) != make(name, seed=1)


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("length", [150, 151, 600, 3000])
def test_prompts_fill_their_length_and_never_exceed_it(name: str, length: int) -> None:
    for seed in range(5):
        used = count(tasks.user_turn(make(name, length, seed=seed)))
        assert length - 12 <= used <= length


@given(length=st.integers(150, 800), seed=st.integers(0, 10_000), odd=st.integers(1, 7))
def test_the_length_holds_for_a_counter_that_is_not_additive(
    length: int, seed: int, odd: int
) -> None:
    def uneven(turn: str) -> int:
        return len(turn) // 5 + turn.count("the") % odd

    sample = tasks.TASKS["MK1"].make(random.Random(seed), length, uneven)
    assert uneven(tasks.user_turn(sample)) <= length


@pytest.mark.parametrize("name", tasks.TASKS)
def test_too_short_a_length_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="expected length_tokens >="):
        make(name, length=6)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_reply_that_is_trained_scores_one(name: str) -> None:
    for seed in range(5):
        sample = make(name, seed=seed)
        assert sample.answers
        assert tasks.score(sample, sample.reply) == 1.0
        assert tasks.score(sample, "I do not know.") == 0.0


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_are_in_the_document(name: str) -> None:
    sample = make(name)
    assert tasks.score(sample, sample.document) == 1.0


@pytest.mark.parametrize("name", ["S1", "S2", "MK1", "MK2"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_asked_fact_is_at_its_depth(name: str, depth: float) -> None:
    sample = make(name, 2000, depth)
    at = sample.document.index(sample.reply) / (len(sample.document) - len(sample.reply))
    assert abs(at - depth) < 0.1


@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_a_depth_outside_the_document_is_an_error(depth: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"expected depth in 0..1, got {depth}")):
        make("S2", depth=depth)


def test_several_needles_go_around_the_document() -> None:
    document = make("MQ", 2000, 0.6).document
    halves = document[: len(document) // 2], document[len(document) // 2 :]
    assert [len(re.findall(r"The [a-z ]+ of the [A-Z]", half)) for half in halves] == [2, 2]


def test_dense_documents_have_nothing_but_distinct_facts() -> None:
    document = make("MK2", 2000).document
    facts = re.split(r"(?<=\.)\s+", document)
    keys = [fact.split(" is ")[0] for fact in facts]
    assert len(facts) > 100
    assert all(re.fullmatch(r"The [a-z ]+ of the [A-Z][\w-]+ [a-z]+ is .+\.", f) for f in facts)
    assert len(set(keys)) == len(keys)


def test_facts_stop_when_their_keys_run_out() -> None:
    some = list(tasks.facts(random.Random(1), "test", ("budget", "mascot"), places=2, things=3))
    assert len({fact.subject for fact in some}) == len(some) == 2 * 2 * 3


def test_a_chain_leads_to_its_number() -> None:
    sample = make("VT")
    holds = dict(re.findall(r"The variable (\w+) is (\w+)\.", sample.document))
    number = sample.question.removesuffix("?").split()[-1]

    def value(name: str) -> str:
        return value(holds[name]) if holds[name] in holds else holds[name]

    assert {name for name in holds if value(name) == number} == set(sample.answers)
    assert len(holds) == 8


def test_the_frequent_words_are_clearly_the_most_frequent() -> None:
    sample = make("FWE")
    words = sample.document.split()
    counts = sorted((words.count(word) for word in set(words)), reverse=True)
    assert sorted(map(words.count, sample.answers), reverse=True) == counts[:3]
    assert counts[2] > 2 * counts[3]


def test_splits_share_no_answer_and_no_key() -> None:
    splits: list[Split] = ["train", "calibration", "test"]
    keys: list[set[str]] = []
    values: list[set[str]] = []
    for split in splits:
        some = list(islice(tasks.facts(random.Random(3), split), 2000))
        keys.append({fact.subject for fact in some})
        values.append({fact.value for fact in some})
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert not keys[a] & keys[b]
        assert not values[a] & values[b]


def test_seeds_of_splits_differ() -> None:
    assert tasks.seeded("train", 1).random() != tasks.seeded("test", 1).random()
    assert tasks.seeded("test", "S2", 1).random() == tasks.seeded("test", "S2", 1).random()


@pytest.mark.parametrize(
    ("answer", "reply", "expected"),
    [
        ("4821", "It is 4821.", 1.0),
        ("4821", "48213", 0.0),
        ("4821", "94821", 0.0),
        ("4821", "4821.5", 0.0),
        ("4821", "0.4821", 0.0),
        ("4821", "A4821", 0.0),
        ("4821", "no 48213, but (4821)", 1.0),
        ("4821", "4821,", 1.0),
        ("4821", "", 0.0),
        ("Clara Martin", "CLARA MARTIN", 1.0),
        ("Clara Martin", "Clara\n  Martin", 1.0),
        ("Clara Martin", "Clara Martinez", 0.0),
        ("pale teal", "the colour of pale teal!", 1.0),
    ],
)
def test_score_matches_whole_words(answer: str, reply: str, expected: float) -> None:
    assert tasks.score(sample_of(answer), reply) == expected


def test_score_is_the_share_of_the_answers() -> None:
    assert tasks.score(sample_of("12", "34", "56", "78"), "12, 56 and 780") == 0.5


def test_a_chat_asks_for_every_fact_and_a_summary() -> None:
    chat = tasks.document_chat(random.Random(5), 500, count, hidden=6)
    questions, replies = zip(*chat.turns, strict=True)
    assert count(tasks.document_turn(chat.document, tasks.SUMMARY_QUESTION)) <= 500
    assert set(replies) >= {fact.sentence for fact in chat.asked}
    assert all(fact.sentence in chat.document for fact in chat.asked)
    assert questions.count(tasks.SUMMARY_QUESTION) == 1
    assert len(chat.turns) == 7


def test_the_summary_is_the_leading_sentences() -> None:
    chat = tasks.document_chat(random.Random(6), 500, count)
    summary = dict(chat.turns)[tasks.SUMMARY_QUESTION]
    assert chat.document.startswith(summary)
    first, second = re.split(r"(?<=[.”])\s(?=[A-Z“])", summary)[:2]
    assert summary.startswith(first) and second in summary


def test_a_chat_takes_other_filler() -> None:
    filler = (f"Sentence number {i} stands here." for i in range(10_000))
    chat = tasks.document_chat(random.Random(7), 400, count, filler=filler)
    assert chat.document.startswith("Sentence number 0 stands here. Sentence number 1 stands here.")


def test_filler_never_names_a_place() -> None:
    document = make("S2", 2000).document
    named = {word.strip(".,") for word in document.split()} & set(prose.PLACES)
    assert len(named) == 1
