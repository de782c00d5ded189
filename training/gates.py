"""Evaluation gates: greedy answers through the chat template, and bits per byte.

`python -m training.gates MODEL [--samples N] [--lengths N ..] [--text FILE]` prints a table and,
last, one line of JSON. Generation uses the PyTorch model in float32 with an uncompressed cache.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from leankv_mlx.evaluation import prose, tasks
from training.data import Encoder
from training.model import Llama, generate

FACTS, SUMMARY = "chat facts", "chat summary"


@dataclass(frozen=True)
class Cell:
    """One gate: a task's name, or FACTS or SUMMARY, at a prompt length in tokens."""

    task: str
    length: int


QUICK = tuple(Cell(task, 4096) for task in ("S2", "MK1", "MK2", FACTS, SUMMARY))
ALL_TASKS = (*tasks.TASKS, FACTS, SUMMARY)
LENGTHS = (1024, 2048, 4096, 8192)


def _task_score(model: Llama, encoder: Encoder, cell: Cell, index: int) -> float:
    rng = tasks.seeded("test", cell.task, cell.length, index)
    sample = tasks.TASKS[cell.task].make(rng, cell.length, encoder.count, None, "test")
    limit = len(encoder.tokens(sample.reply)) + 16
    return tasks.score(sample, _reply(model, encoder, tasks.user_turn(sample), limit))


def _reply(model: Llama, encoder: Encoder, user: str, limit: int) -> str:
    return encoder.decode(generate(model, encoder.prompt(user), limit, encoder.stop))


def _chat_score(model: Llama, encoder: Encoder, cell: Cell, index: int) -> float:
    """One question about a document of prose: a fact, or the summary word for word."""
    rng = tasks.seeded("test", "chat", cell.length, index)
    chat = tasks.document_chat(rng, cell.length, encoder.count, "test")
    summary = cell.task == SUMMARY
    question, expected = next(
        turn for turn in chat.turns if (turn[0] == tasks.SUMMARY_QUESTION) == summary
    )
    limit = len(encoder.tokens(expected)) + 16
    reply = _reply(model, encoder, tasks.document_turn(chat.document, question), limit)
    if summary:
        return shared_start(reply.split(), expected.split())
    fact = next(fact for fact in chat.asked if fact.sentence == expected)
    return tasks.score(tasks.Sample(chat.document, question, (fact.value,)), reply)


def shared_start(reply: list[str], expected: list[str]) -> float:
    """Share of the expected words that the reply has, in order, before its first slip."""
    same = 0
    for a, b in zip(reply, expected, strict=False):
        if a != b:
            break
        same += 1
    return same / max(len(reply), len(expected))


def measure(
    model: Llama, encoder: Encoder, cells: tuple[Cell, ...], samples: int
) -> dict[str, dict[int, float]]:
    """Mean score, 0..1, by task and length; sample i of a cell is the same for every model."""
    results: dict[str, dict[int, float]] = {}
    for cell in cells:
        score = _chat_score if cell.task in (FACTS, SUMMARY) else _task_score
        total = sum(score(model, encoder, cell, i) for i in range(samples))
        results.setdefault(cell.task, {})[cell.length] = total / samples
    return results


@torch.inference_mode()
def bits_per_byte(model: Llama, encoder: Encoder, text: str, context: int, chunks: int) -> float:
    """Of the second halves of `chunks` chunks of `context` tokens, spread over the text."""
    ids = encoder.tokens(text)
    nats, size = 0.0, 0
    starts = range(0, len(ids) - context, max(1, (len(ids) - context) // chunks))
    for start in list(starts)[:chunks]:
        chunk = ids[start : start + context - 1]
        hidden, _ = model(torch.tensor([[encoder.bos, *chunk[:-1]]]))
        half = context // 2
        logits = model.logits(hidden[0, half:])
        nats += float(F.cross_entropy(logits, torch.tensor(chunk[half:]), reduction="sum"))
        size += len(encoder.decode(chunk[half:]).encode())
    return nats / math.log(2) / size


def table(results: dict[str, dict[int, float]]) -> str:
    """Tasks down, lengths across, in percent."""
    lengths = sorted({length for row in results.values() for length in row})
    lines = ["task          " + "".join(f"{length:>8}" for length in lengths)]
    for task, row in results.items():
        cells = (f"{100 * row[n]:>8.1f}" if n in row else f"{'':>8}" for n in lengths)
        lines.append(f"{task:<14}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="model folder in mlx-lm's format")
    parser.add_argument("--samples", type=int, default=20, help="samples a cell")
    parser.add_argument("--tasks", nargs="*", default=ALL_TASKS, choices=ALL_TASKS, metavar="TASK")
    parser.add_argument("--lengths", nargs="*", default=LENGTHS, type=int, help="tokens")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="held-out text files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = Encoder(AutoTokenizer.from_pretrained(args.model))
    model = Llama.load(args.model).eval()
    cells = tuple(Cell(task, length) for task in args.tasks for length in args.lengths)
    results = measure(model, encoder, cells, args.samples)
    texts = {path.name: path.read_text() for path in args.text}
    texts["our own prose"] = prose.text(random.Random("test/prose"), 200_000)
    bits = {
        name: round(bits_per_byte(model, encoder, text, 1024, 64), 4)
        for name, text in texts.items()
    }
    print(table(results))
    for name, value in bits.items():
        print(f"{name}: {value:.3f} bits per byte")
    document: dict[str, Any] = {
        "samples": args.samples, "scores": results, "bits_per_byte": bits,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
