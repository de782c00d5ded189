"""Ten questions about one document, one after the other, without reading it again.

The document is read once and then, where the settings say scores=repeat, judged without knowing
any question. Each question and its reply are cut off again before the next one, so an arm that
drops tokens by the first question has to answer the others from what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from leankv_mlx.errors import ModelError, UsageError
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.evaluation.retrieval import reply_to, tokens_of
from leankv_mlx.evaluation.tasks import Sample, document_chat, document_turn, score, seeded
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.mlx_lm.repetition import settle_document
from leankv_mlx.mlx_lm.usage import measure

QUESTIONS = 10
_REPLY_TOKENS = 48


@dataclass(frozen=True)
class Answers:
    """Of one arm at one length.

    Attributes:
        score: mean over all questions, 0..1.
        first: mean over the first question of each document.
        ratio: how many times smaller than fp16 the cache is behind a reply, mean.
    """

    score: float
    first: float
    ratio: float

    def as_dict(self) -> dict[str, float]:
        """For the JSON document."""
        return {"score": self.score, "first": self.first, "ratio": self.ratio}


def run_questions(
    loaded: LoadedModel,
    arms: Sequence[Arm],
    lengths: Sequence[int],
    documents: int,
    advance: Callable[[str, int], None],
) -> Mapping[str, Mapping[int, Answers]]:
    """Ask every arm everything: arm -> length -> answers.

    Raises:
        ModelError: the model has no chat template.
        UsageError: a length is too short for ten facts.
    """
    if documents and not loaded.tokenizer.has_chat_template:
        raise ModelError(f"{loaded.path} has no chat template, which questions need.")
    found: dict[str, dict[int, Answers]] = {arm.kv: {} for arm in arms}
    for length in lengths if documents else ():
        scores: dict[str, list[list[float]]] = {arm.kv: [] for arm in arms}
        ratios: dict[str, list[float]] = {arm.kv: [] for arm in arms}
        for i in range(documents):
            samples = _samples(loaded, length, i)
            for arm in arms:
                with arm.attached(loaded.model):
                    answered, ratio = _ask(loaded, samples)
                scores[arm.kv].append(answered)
                ratios[arm.kv].append(ratio)
                advance(f"questions {length} {arm.kv}", length)
        for kv, by_document in scores.items():
            every = [x for answered in by_document for x in answered]
            first = [answered[0] for answered in by_document]
            found[kv][length] = Answers(
                sum(every) / len(every), sum(first) / len(first), sum(ratios[kv]) / documents
            )
    return found


def _samples(loaded: LoadedModel, length: int, i: int) -> list[Sample]:
    rng = seeded("test", "questions", length, i)
    try:
        chat = document_chat(
            rng, length, lambda turn: len(tokens_of(loaded, turn)), hidden=QUESTIONS
        )
    except ValueError as error:
        raise UsageError(f"ten facts do not fit into {length} tokens.") from error
    asked = rng.sample(chat.asked, QUESTIONS)
    return [Sample(chat.document, fact.question, (fact.value,), fact.sentence) for fact in asked]


def _ask(loaded: LoadedModel, samples: Sequence[Sample]) -> tuple[list[float], float]:
    """The score of every question, and the mean ratio."""
    prompts = [tokens_of(loaded, document_turn(s.document, s.question)) for s in samples]
    shared = _shared(prompts)
    caches = make_caches(loaded.model)
    document = prompts[0][:shared]
    prefill(loaded.model, document, caches)
    settle_document(loaded.model, caches, document)
    scores, ratios = [], []
    for sample, prompt in zip(samples, prompts, strict=True):
        reply = reply_to(loaded, caches, prompt[shared:], sample, _REPLY_TOKENS)
        scores.append(score(sample, reply))
        ratios.append(measure(caches).ratio)
        for cache in caches:
            cache.trim(cache.offset - shared)
    return scores, sum(ratios) / len(ratios)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    columns = zip(*prompts, strict=False)
    return next(i for i, column in enumerate(columns) if len(set(column)) > 1)
