"""Training sequences: running text, and generated examples in the chat template.

Sequence number i of a run is drawn from a seed made of the run's seed and i, so a resumed run
continues with exactly the data that it would have seen. A sequence is token ids [N] and weights
[N]: weights[j] is the weight of predicting ids[j] from what stands before it. Replies have the
weight `reply`, documents a weight of their own kind, and questions none.
"""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leankv_mlx.evaluation import prose, tasks

Message = dict[str, str]
_WORD = re.compile(r"[A-Za-z]{3,}")
_SENTENCE_END = re.compile(r"(?<=[.!?”\"])\s+(?=[A-Z“\"])")


@dataclass(frozen=True)
class Example:
    """Token ids and the weight of each as a target; both have N entries."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Weights:
    """Loss weights of targets by what they belong to."""

    text: float
    reply: float
    document: float
    dense: float


def read_text(path: Path) -> str:
    """The training text; `.xz` is unpacked."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


class Encoder:
    """Chats -> sequences, through the chat template of a `transformers` tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int = tokenizer.bos_token_id
        self.stop: int = tokenizer.eos_token_id

    def render(self, messages: list[Message], prompt: bool) -> str:
        """The template's text; `prompt` opens the assistant's turn."""
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def tokens(self, text: str) -> list[int]:
        """Ids of `text` as it stands, nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`."""
        text: str = self._tokenizer.decode(ids)
        return text

    def prompt(self, user: str) -> list[int]:
        """Ids of a chat that waits for the reply to its first message."""
        return self.tokens(self.render([{"role": "user", "content": user}], prompt=True))

    def count(self, user: str) -> int:
        """Tokens of `prompt(user)`: the counter that `leankv_mlx.evaluation.tasks` expects."""
        return len(self.prompt(user))

    def chat(
        self, document: str, turns: Sequence[tuple[str, str]], weight: float, reply: float
    ) -> Example:
        """A document, its questions and replies; `weight` is that of the document's tokens.

        The whole chat is one string through the tokenizer, as at inference. The weight of a
        reply covers exactly its tokens and the end token after them.
        """
        messages: list[Message] = []
        spans: list[tuple[int, int, float]] = []
        for i, (question, answer) in enumerate(turns):
            content = tasks.document_turn(document, question) if i == 0 else question
            messages.append({"role": "user", "content": content})
            start = len(self.render(messages, prompt=True))
            messages.append({"role": "assistant", "content": answer})
            spans.append((start, len(self.render(messages, prompt=False)), reply))
        text = self.render(messages, prompt=False)
        if weight:
            start = text.index(document)
            spans.append((start, start + len(document), weight))
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        marks = [0.0] * (len(text) + 1)
        for start, end, value in spans:
            marks[start:end] = [value] * (end - start)
        # A token belongs to the span of its last character: its first may be a space before it.
        weights = [marks[end - 1] for _, end in encoded["offset_mapping"]]
        return Example(encoded["input_ids"], weights)


class Stream:
    """Draws sequences of a mixture of kinds."""

    def __init__(
        self, encoder: Encoder, text: str, mixture: dict[str, float], weights: Weights, seed: int
    ) -> None:
        makers: dict[str, Callable[[random.Random, int], Example]] = {
            "text": self._text,
            "dense": self._dense,
            "chat": self._chat,
            "task": self._task,
            "recall": self._recall,
        }
        if unknown := set(mixture) - set(makers):
            raise ValueError(f"[Stream] expected kinds of {sorted(makers)}, got {unknown}.")
        self._encoder, self._body, self._weights, self._seed = encoder, text, weights, seed
        self._makers = [makers[kind] for kind in mixture]
        self._shares = list(mixture.values())

    def draw(self, index: int, shortest: int, longest: int) -> Example:
        """Sequence number `index`, at most about `longest` tokens.

        Lengths are log-uniform between the two, so that short and long ones are equally frequent.
        """
        rng = random.Random(f"{self._seed}/{index}")
        make = rng.choices(self._makers, self._shares)[0]
        length = round(shortest * (longest / shortest) ** rng.random())
        sequence = make(rng, length)
        return Example(sequence.ids[:longest], sequence.weights[:longest])

    def _passage(self, rng: random.Random, characters: int) -> str:
        start = rng.randrange(max(1, len(self._body) - characters))
        return self._body[start : start + characters]

    def _text(self, rng: random.Random, length: int) -> Example:
        """Running text, one in eight of our own prose."""
        own = rng.random() < 0.125
        text = prose.text(rng, 6 * length) if own else self._passage(rng, 6 * length)
        ids = [self._encoder.bos, *self._encoder.tokens(text)[:length]]
        return Example(ids, [0.0] + [self._weights.text] * (len(ids) - 1))

    def _dense(self, rng: random.Random, length: int) -> Example:
        """A document of facts only, which share many words, and many questions."""
        places, things = rng.choice([(4, 6), (8, 12), (16, None), (None, None), (None, None)])
        questions = rng.choice([1, 8, 16, 24])
        some: list[tasks.Fact] = []
        for fact in tasks.facts(rng, "train", places=places, things=things):
            size = len(self._encoder.tokens(" " + fact.sentence))
            some.append(fact)
            length -= size
            if length < 2 * questions * size and len(some) >= 4:  # a question and its reply
                break
        document = tasks.weave([fact.sentence for fact in some], [])
        asked = rng.sample(some, min(len(some), questions))
        turns = [(tasks.ask(rng, fact), fact.sentence) for fact in asked]
        return self._encoder.chat(document, turns, self._weights.dense, self._weights.reply)

    def _chat(self, rng: random.Random, length: int) -> Example:
        """Text or our own prose with some facts, all asked for, and a summary (or only that)."""
        hidden = rng.choice([0, 0, 1, 4, 4, 8, 16])
        own = rng.random() < 0.5
        filler = prose.sentences(rng) if own else self._sentences(rng, length)
        budget = max(300 + 40 * hidden, length - 40 * hidden)
        chat = tasks.document_chat(rng, budget, self._encoder.count, "train", filler, hidden)
        weight = self._weights.document if own else self._weights.text
        return self._encoder.chat(chat.document, chat.turns, weight, self._weights.reply)

    def _sentences(self, rng: random.Random, length: int) -> Iterator[str]:
        """Whole sentences of running text, each on one line."""
        parts = _SENTENCE_END.split(" ".join(self._passage(rng, 8 * length).split()))
        return (part for part in parts[1:-1] if 20 <= len(part) <= 400)

    def _task(self, rng: random.Random, length: int) -> Example:
        """A retrieval task other than dense needles, as it is evaluated."""
        name = rng.choice([name for name in tasks.TASKS if name != "MK2"])
        sample = tasks.TASKS[name].make(
            rng, max(length - 60, 300), self._encoder.count, None, "train"
        )
        turns = [(sample.question, sample.reply)]
        weight = 0.0 if name in ("S1", "FWE") else self._weights.document
        return self._encoder.chat(sample.document, turns, weight, self._weights.reply)

    def _recall(self, rng: random.Random, length: int) -> Example:
        """Look-up lists, associative recall and list copying, over words of the text."""
        words = list(dict.fromkeys(_WORD.findall(self._passage(rng, 3 * length + 400))))
        rng.shuffle(words)
        if rng.random() < 0.3:
            items = words[: max(2, min(40, length // 8))]
            turns = [("Repeat the list.", ", ".join(items) + ".")]
            return self._encoder.chat(", ".join(items) + ".", turns, 0.0, self._weights.reply)
        keys = words[: max(2, length // 20)]
        values = [
            prose.number(rng, "train", rng.randint(3, 6))
            if rng.random() < 0.5
            else prose.made_up_word(rng, "train")
            for _ in keys
        ]
        form = rng.choice(["{}: {}", "{} is {}.", "{} = {}"])
        pairs = list(zip(keys, values, strict=True))
        document = "\n".join(form.format(*pair) for pair in pairs)
        asked = rng.sample(pairs, min(len(pairs), 24))
        chat = [(f"What is {key}?", f"{key} is {value}.") for key, value in asked]
        return self._encoder.chat(document, chat, 0.0, self._weights.reply)
