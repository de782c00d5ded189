"""Train the demo model: `python -m training.train --text FILE --out FOLDER [--init FOLDER]`.

The run can be stopped at any time; started again with the same --out it goes on from its last
checkpoint with the same data, the same optimizer state and the same clock.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from training.data import Encoder, Example, Stream, Weights, read_text
from training.export import export
from training.gates import QUICK, measure, table
from training.model import Llama, ModelConfig
from training.optim import optimizers


@dataclass
class Progress:
    """How far a run has come; stored in its checkpoints."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gates: list[dict[str, Any]] = field(default_factory=list)


def share(progress: Progress, run: dict[str, Any]) -> float:
    """Share of the budget that is spent, of tokens or of time, whichever is more."""
    tokens: float = progress.tokens / run["tokens"]
    minutes: float = progress.seconds / 60 / run["minutes"]
    return max(tokens, minutes)


def rate(spent: float, step: int, optimizer: dict[str, Any]) -> float:
    """Factor of the learning rates: warm-up, a hold, then linear to zero."""
    warm: float = min(1.0, (step + 1) / optimizer["warmup_steps"])
    hold: float = optimizer["hold"]
    return warm * min(1.0, max(0.0, 1 - spent) / (1 - hold))


def example_loss(model: Llama, forward: Any, example: Example) -> Tensor:
    """Weighted sum of the cross-entropies of the targets that have a weight.

    Only their positions go through the output projection, a fifth of the model's work.
    """
    ids = torch.tensor(example.ids)
    weights = torch.tensor(example.weights)[1:]
    at = weights.nonzero().squeeze(1)
    hidden, _ = forward(ids[None, :-1])
    losses = F.cross_entropy(model.logits(hidden[0, at]), ids[at + 1], reduction="none")
    return (losses * weights[at]).sum()


class Trainer:
    """A model, its optimizers and its data; `step` is one update."""

    def __init__(self, model: Llama, stream: Stream, config: dict[str, Any]) -> None:
        self.model, self.stream, self.config = model, stream, config
        settings = config["optimizer"]
        self.optimizers = optimizers(
            model, settings["muon_lr"], settings["adam_lr"], settings["decay"]
        )
        self.base_rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.progress = Progress()
        self.forward = torch.compile(model, dynamic=True) if config["run"]["compile"] else model

    def draw(self, spent: float) -> list[Example]:
        """The examples of the next step."""
        stage = next((s for s in self.config["stages"] if spent < s["until"]), None)
        stage = stage or self.config["stages"][-1]
        examples: list[Example] = []
        while sum(len(e.ids) for e in examples) < self.config["run"]["tokens_per_step"]:
            examples.append(
                self.stream.draw(self.progress.examples, stage["shortest"], stage["longest"])
            )
            self.progress.examples += 1
        return examples

    def step(self) -> float:
        """One update; returns the mean loss by weight, in nats."""
        started = time.monotonic()
        spent = share(self.progress, self.config["run"])
        examples = self.draw(spent)
        total = sum(sum(e.weights[1:]) for e in examples)
        summed = 0.0
        for example in examples:
            loss = example_loss(self.model, self.forward, example) / total
            loss.backward()  # type: ignore[no-untyped-call]
            summed += float(loss.detach())
        settings = self.config["optimizer"]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings["clip"])
        factor = rate(spent, self.progress.step, settings)
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += sum(len(e.ids) for e in examples)
        self.progress.seconds += time.monotonic() - started
        return summed

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash while it is written leaves the one before."""
        partial = path.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of `save`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def run(trainer: Trainer, encoder: Encoder, tokenizer: Path, out: Path) -> None:
    """Train until the budget is spent, with checkpoints and gates on the way."""
    settings, progress = trainer.config["run"], trainer.progress
    saved = gated = progress.seconds
    tokens, clock = progress.tokens, time.monotonic()
    while (spent := share(progress, settings)) < 1.0:
        loss = trainer.step()
        if progress.step % 10 == 0:
            speed = (progress.tokens - tokens) / (time.monotonic() - clock)
            tokens, clock = progress.tokens, time.monotonic()
            print(
                f"step {progress.step}  tokens {progress.tokens}  spent {spent:.3f}  "
                f"loss {loss:.3f}  {speed:.0f} tokens/s",
                flush=True,
            )
        if progress.seconds - saved > 60 * settings["checkpoint_minutes"]:
            trainer.save(out / "checkpoint.pt")
            saved = progress.seconds
        if progress.seconds - gated > 60 * settings["gate_minutes"]:
            results = measure(trainer.model, encoder, QUICK, settings["gate_samples"])
            progress.gates.append({"tokens": progress.tokens, "gates": results})
            print(table(results), flush=True)
            export(trainer.model, tokenizer, out / f"step-{progress.step}")
            gated, tokens, clock = progress.seconds, progress.tokens, time.monotonic()
    trainer.save(out / "checkpoint.pt")
    export(trainer.model, tokenizer, out / "final")
    (out / "progress.json").write_text(json.dumps(asdict(progress), indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.toml"))
    parser.add_argument("--text", type=Path, required=True, help="training text, .txt or .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--init", type=Path, help="model folder to start from, in mlx-lm's format")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder; default: that of --init")
    args = parser.parse_args()
    tokenizer = args.tokenizer or args.init
    if tokenizer is None:
        parser.error("give --init, or --tokenizer to start from scratch")
    config = tomllib.loads(args.config.read_text())
    torch.set_num_threads(config["run"]["threads"])
    torch.manual_seed(config["run"]["seed"])
    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer))
    stream = Stream(
        encoder,
        read_text(args.text),
        config["mixture"],
        Weights(**config["weights"]),
        config["run"]["seed"],
    )
    model = Llama.load(args.init) if args.init else Llama(ModelConfig(**config["model"]))
    trainer = Trainer(model, stream, config)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "checkpoint.pt").exists():
        trainer.restore(args.out / "checkpoint.pt")
    run(trainer, encoder, tokenizer, args.out)


if __name__ == "__main__":
    main()
