"""Train the tokenizer: `python -m training.tokenizer --text FILE --out FOLDER`.

Byte-level BPE in which every digit is a token of its own, so that a number is copied digit by
digit, and six special tokens. The chat template puts a token of the role in front of a message
and the end token behind it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.data import read_text

SPECIAL = ["<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(pieces: Iterator[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of `vocabulary` entries, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def write(tokenizer: Tokenizer, longest: int, folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as `transformers` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="training text, .txt or .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=8192, help="model_max_length")
    parser.add_argument("--characters", type=int, default=20_000_000, help="how much to read")
    args = parser.parse_args()
    text = read_text(args.text)[: args.characters]
    pieces = (text[i : i + 100_000] for i in range(0, len(text), 100_000))
    write(train(pieces, args.vocabulary), args.longest, args.out)


if __name__ == "__main__":
    main()
