"""Retrieval: the tasks of `evaluation.tasks`, answered greedily from the real cache.

A prompt goes through the chat template and is prefilled in chunks of 512 tokens, so the question
and most of the document attend to compressed tokens; the answer is decoded from the codes. All
arms get the same prompts, and an arm is told from the uncompressed one by the prompts that only one
of the two answers: what both answer, or neither, says nothing about the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import mlx.core as mx

from leankv_mlx.errors import ModelError, UsageError
from leankv_mlx.evaluation.arms import Arm, settle
from leankv_mlx.evaluation.tasks import TASKS, Sample, score, seeded, user_turn
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK, prefill
from leankv_mlx.mlx_lm.repetition import judges_by_repetition
from leankv_mlx.mlx_lm.usage import measure

SOLVED = 0.8
"""Score of the uncompressed arm from which on the difference of two means says something."""
DEPTHS = 11
"""Needles are placed at 0%, 10%, .. 100% of the document, one depth after the other."""

_SPARE_TOKENS = 32


@dataclass(frozen=True, order=True)
class Cell:
    """A task at a prompt length in tokens."""

    task: str
    length: int


@dataclass(frozen=True)
class Pairs:
    """Prompts answered fully by both arms, by one of them, by neither."""

    both: int
    only_base: int
    only_arm: int
    neither: int

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how likely so uneven a split, or a more uneven one, is if neither
        arm is better."""
        n, fewer = self.only_base + self.only_arm, min(self.only_base, self.only_arm)
        return min(1.0, 2 * sum(comb(n, i) for i in range(fewer + 1)) * 0.5**n)

    def as_dict(self) -> dict[str, float]:
        """For the JSON document."""
        return {
            "both": self.both,
            "only_uncompressed": self.only_base,
            "only_this": self.only_arm,
            "neither": self.neither,
            "p_value": self.p_value,
        }


Scores = Mapping[str, Mapping[Cell, Sequence[float]]]
"""Arm -> cell -> score of each prompt, 0..1."""


@dataclass(frozen=True)
class Retrieval:
    """Scores of all arms; `base` names the uncompressed one. `ratios` tells, arm by arm and cell by
    cell, how many times smaller than fp16 the cache was after the reply, mean over the prompts."""

    scores: Scores
    base: str
    ratios: Mapping[str, Mapping[Cell, float]]

    def means(self, kv: str) -> dict[str, dict[str, float]]:
        """Mean score of an arm, by task and length."""
        means: dict[str, dict[str, float]] = {}
        for cell, values in self.scores[kv].items():
            means.setdefault(cell.task, {})[str(cell.length)] = sum(values) / len(values)
        return means

    def solved(self) -> list[Cell]:
        """Cells where the uncompressed arm scores at least `SOLVED`."""
        scores = self.scores[self.base].items()
        return [cell for cell, values in scores if sum(values) >= SOLVED * len(values)]

    def pairs(self, kv: str, cells: Sequence[Cell]) -> Pairs:
        """Paired counts of an arm beside the uncompressed one over some cells."""
        wins = [
            (base == 1.0, arm == 1.0)
            for cell in cells
            for base, arm in zip(self.scores[self.base][cell], self.scores[kv][cell], strict=True)
        ]
        outcomes = ((True, True), (True, False), (False, True), (False, False))
        return Pairs(*map(wins.count, outcomes))


@dataclass(frozen=True)
class _Prompt:
    sample: Sample
    tokens: list[int]
    limit: int


def cells_of(tasks: Sequence[str], lengths: Sequence[int]) -> list[Cell]:
    """Every task at every length.

    Raises:
        UsageError: a task is unknown.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"unknown task {', '.join(unknown)}; known are {', '.join(TASKS)}.")
    return [Cell(task, length) for task in tasks for length in lengths]


def run_retrieval(
    loaded: LoadedModel,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    samples: int,
    advance: Callable[[str, int], None],
) -> Retrieval:
    """Ask every arm every prompt, arms in turn on each; the first arm is the uncompressed one.

    Raises:
        ModelError: the model has no chat template.
        UsageError: a length does not suit the task or the model.
    """
    if cells and not loaded.tokenizer.has_chat_template:
        raise ModelError(
            f"{loaded.path} has no chat template, which retrieval needs; use --tasks none."
        )
    scores: dict[str, dict[Cell, list[float]]] = {
        arm.kv: {cell: [] for cell in cells} for arm in arms
    }
    ratios: dict[str, dict[Cell, list[float]]] = {
        arm.kv: {cell: [] for cell in cells} for arm in arms
    }
    for cell in cells:
        for i in range(samples):
            prompt = _make(loaded, cell, i)
            for arm in arms:
                with arm.attached(loaded.model):
                    reply, ratio = _answer(loaded, prompt)
                ratios[arm.kv][cell].append(ratio)
                scores[arm.kv][cell].append(score(prompt.sample, reply))
                advance(f"{cell.task} {cell.length} {arm.kv}", cell.length)
    means = {
        kv: {cell: sum(values) / len(values) for cell, values in by_cell.items()}
        for kv, by_cell in ratios.items()
    }
    return Retrieval(scores, arms[0].kv, means)


def _make(loaded: LoadedModel, cell: Cell, i: int) -> _Prompt:
    depth = (i % DEPTHS) / (DEPTHS - 1)
    rng = seeded("test", cell.task, cell.length, i)
    try:
        sample = TASKS[cell.task].make(
            rng, cell.length, lambda turn: len(tokens_of(loaded, turn)), depth
        )
    except ValueError as error:
        raise UsageError(f"{cell.task} does not fit into {cell.length} tokens.") from error
    tokens = tokens_of(loaded, user_turn(sample))
    reply = len(loaded.tokenizer.encode(sample.reply, add_special_tokens=False))
    limit = check_context(loaded.config, len(tokens), 2 * reply + _SPARE_TOKENS)
    return _Prompt(sample, tokens, limit)


def tokens_of(loaded: LoadedModel, turn: str) -> list[int]:
    """Tokens of a prompt that is one message of the user."""
    tokens: list[int] = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=False,
    )
    return tokens


def _answer(loaded: LoadedModel, prompt: _Prompt) -> tuple[str, float]:
    """The greedy reply, and how many times smaller than fp16 the cache is behind it."""
    caches = make_caches(loaded.model)
    tokens = prompt.tokens
    if judges_by_repetition(caches):
        prefill(loaded.model, tokens[:-1], caches)
        settle(loaded.model, caches, tokens[:-1])
        tokens = tokens[-1:]
    return reply_to(loaded, caches, tokens, prompt.sample, prompt.limit), measure(caches).ratio


def reply_to(
    loaded: LoadedModel, caches: list[Any], tokens: Sequence[int], sample: Sample, limit: int
) -> str:
    """The greedy reply to a prompt whose beginning is in the caches and whose end is `tokens`; it
    ends early once it holds every answer."""
    from mlx_lm.generate import generate_step

    tokenizer = loaded.tokenizer
    reply: list[int] = []
    text = ""
    steps = generate_step(
        mx.array(list(tokens)), loaded.model, max_tokens=limit, prompt_cache=caches,
        prefill_step_size=PREFILL_CHUNK,
    )  # fmt: skip
    for token, _ in steps:
        if token in tokenizer.eos_token_ids:
            break
        reply.append(token)
        text = tokenizer.decode(reply, skip_special_tokens=True)
        # The last word may go on: "48" could become "4821".
        if score(sample, " ".join(text.split()[:-1])) == 1.0:
            break
    steps.close()
    return text
