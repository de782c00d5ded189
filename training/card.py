"""Write the model card of an exported folder from what was measured.

`python -m training.card MODEL --gates FILE --training TEXT --data TEXT --longest N`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from leankv_mlx.evaluation import tasks
from training.gates import FACTS, SUMMARY
from training.model import ModelConfig

_DESCRIPTIONS = {name: task.description for name, task in tasks.TASKS.items()} | {
    FACTS: "one of four facts in prose, asked in the words of a chat",
    SUMMARY: "share of the leading two sentences given word for word before the first slip",
}
_RELIABLE = 0.9

_CARD = """\
# leankv demo model

A small Llama-style language model trained for this project so that everything works offline. It
copies, looks facts up in a document and gives a document's leading sentences as its summary. It
knows nothing else worth asking: it does not reason, has no knowledge of the world and was not
taught to refuse or to say that a fact is missing.

| | |
|---|---|
| architecture | {architecture} |
| size | {size} |
| tokenizer | byte-level BPE, {vocab:,} entries, single digits; special tokens pad, bos, system, \
user, assistant, end |
| training | {training} |
| data | {data} |
| chat form | `Document:\\n{{text}}\\n\\n{{question}}` as the user's turn; \
further questions may follow |
| context | trained on sequences of up to {longest:,} tokens; `max_position_embeddings` is \
{positions:,}, but what lies beyond {longest:,} was not trained |
| mask of key channels | `--kv leankv:k4v4,mask=demo` leaves out 70% of them once a prompt is in \
(learned by `leankv learn masks --ratio 0.7 -o demo --tokens 4096 --documents 16 \
--steps 500`) |
| licence | MIT |

Facts have the form "The {{attribute}} of the {{place}} {{thing}} is {{value}}."; the questions are
"What is the ...?", "Tell me the ...", "Find the ..." and "{summary}" The attributes are
{attributes}.

## Measured

Greedy, uncompressed cache, through the chat template; names, numbers and seeds that training never
saw; {samples} samples a cell, so one cell is uncertain by about {error:.0f} points at 50% and
{error_high:.0f} at 95%. Scores in percent{compared}.

{scores}

| text | bits per byte{before_head} |
|---|---|{before_rule}
{bits}

Bits per byte: second halves of 1,024-token chunks behind a bos token.

## What it can and cannot do

{verdict}

Made by `training/` of the project; `training/README.md` has the recipe.
"""


def scores(after: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Markdown table: tasks down, lengths across, "after (before)" in every cell."""
    lengths = list(next(iter(after["scores"].values())))
    lines = [
        "| task | " + " | ".join(f"{int(length):,}" for length in lengths) + " | what |",
        "|---|" + "---|" * (len(lengths) + 1),
    ]
    for task, row in after["scores"].items():
        cells = []
        for length in lengths:
            old = (before or {}).get("scores", {}).get(task, {}).get(length)
            cells.append(
                f"{100 * row[length]:.0f}" + ("" if old is None else f" ({100 * old:.0f})")
            )
        lines.append(f"| {task} | " + " | ".join(cells) + f" | {_DESCRIPTIONS[task]} |")
    return "\n".join(lines)


def verdict(after: dict[str, Any]) -> str:
    """One line a task: up to which measured length it is reliable."""
    lines = []
    for task, row in after["scores"].items():
        good = [int(length) for length, value in row.items() if value >= _RELIABLE]
        best = max(row.values())
        if not good:
            said = f"not reliable at any length (best {100 * best:.0f}%)"
        elif len(good) == len(row):
            said = f"at least {100 * _RELIABLE:.0f}% at every measured length"
        else:
            lengths = ", ".join(f"{length:,}" for length in good)
            said = f"at least {100 * _RELIABLE:.0f}% at {lengths} tokens, less elsewhere"
        lines.append(f"- {task} ({_DESCRIPTIONS[task]}): {said}.")
    return "\n".join(lines)


def card(folder: Path, measured: dict[str, Any], facts: dict[str, Any]) -> str:
    """The text of README.md.

    `measured` has the gate documents `after` and, maybe, `before`; `facts` the keys `training`,
    `data` (sentences) and `longest` (tokens).
    """
    config, after, before = ModelConfig.read(folder), measured["after"], measured.get("before")
    weights = folder / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    bits = [
        f"| {name} | {value:.3f}"
        + (f" | {before['bits_per_byte'][name]:.3f} |" if before else " |")
        for name, value in after["bits_per_byte"].items()
    ]
    n = after["samples"]
    return _CARD.format(
        architecture=(
            f"`llama`, no QK-norm: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"{config.num_attention_heads} query heads, {config.num_key_value_heads} KV heads, "
            f"head_dim {config.head_dim}, SwiGLU {config.intermediate_size}, tied embeddings, "
            f"RoPE base {config.rope_theta:,.0f}"
        ),
        size=f"{parameters / 1e6:.1f}M parameters, bf16 ({weights.stat().st_size / 1e6:.1f} MB)",
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        summary=tasks.SUMMARY_QUESTION,
        attributes=", ".join(tasks.ATTRIBUTES),
        samples=n,
        error=100 * (0.25 / n) ** 0.5,
        error_high=100 * (0.95 * 0.05 / n) ** 0.5,
        compared=", in brackets those of the first version" if before else "",
        scores=scores(after, before),
        before_head=" | first version" if before else "",
        before_rule="---|" if before else "",
        bits="\n".join(bits),
        verdict=verdict(after),
        **facts,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="exported folder; its README.md is written")
    parser.add_argument("--gates", type=Path, required=True, help="JSON of training.gates")
    parser.add_argument("--before", type=Path, help="the same for the model it started from")
    parser.add_argument("--training", required=True, help="sentence: tokens, time, hardware")
    parser.add_argument("--data", required=True, help="sentence: text and generated data")
    parser.add_argument("--longest", type=int, required=True, help="longest trained sequence")
    args = parser.parse_args()
    measured = {"after": json.loads(args.gates.read_text())}
    if args.before:
        measured["before"] = json.loads(args.before.read_text())
    facts = {"training": args.training, "data": args.data, "longest": args.longest}
    (args.model / "README.md").write_text(card(args.model, measured, facts))


if __name__ == "__main__":
    main()
