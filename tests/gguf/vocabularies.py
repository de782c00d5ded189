"""Tiny tokenizers as they stand in the metadata of GGUF files."""

from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(**changes: Any) -> dict[str, Any]:
    """A gpt2 tokenizer: all bytes, a few merges, three special tokens and one of the user's.

    `changes` replace keys below tokenizer.ggml; None takes one away.
    """
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 hello", "\u0120 \u0120", "! !"]
    words = [merge.replace(" ", "") for merge in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    tokens = [*sorted(ByteLevel.alphabet()), *words, *special]
    return _metadata(
        {
            "model": "gpt2",
            "pre": "qwen2",
            "tokens": tokens,
            "token_type": np.array([1] * (len(tokens) - 4) + [3, 3, 3, 4], np.int32),
            "merges": merges,
            "bos_token_id": tokens.index("<|endoftext|>"),
            "eos_token_id": tokens.index("<|im_end|>"),
            "add_bos_token": False,
        }
        | changes
    )


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A llama tokenizer: all bytes, a few letters and words with scores, and special tokens."""
    scored = {"ab": -1.0, "bc": -2.0, "abc": -3.0, "\u2581a": -4.0, "aa": -5.0, "aaa": -6.0}
    letters = ["\u2581", "a", "b", "c", "\u4f60"]
    special = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *data, *scored, *letters, "<tool>", "  "]
    return _metadata(
        {
            "model": "llama",
            "tokens": tokens,
            "scores": np.array([0.0] * 259 + [*scored.values()] + [-9.0] * 7, np.float32),
            "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 11 + [4, 4], np.int32),
        }
        | changes
    )


def _metadata(fields: dict[str, Any]) -> dict[str, Any]:
    given = {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
    return {"general.name": "Tiny"} | given
