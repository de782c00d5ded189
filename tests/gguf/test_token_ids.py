"""Token ids of real models are those of llama.cpp, and their text comes back.

Digests of the ids were recorded from ik_llama.cpp. Where it is installed, here or for the
interpreter that LEANKV_IK_PYTHON names, the ids are compared with it once more.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer

from leankv_mlx.models.vocabulary import end_ids, tokenizer_files
from tests.gguf.texts import tricky_text

pytestmark = pytest.mark.real

MODELS = Path(sys.prefix) / "models"
DIGESTS = {
    "smollm2-135m-instruct": {
        "tricky": "4de575bb68783e34f10b01800799c24fe285b38a81f23e419e493317bb655745",
        "wikitext": "2b630871f194f28165b60b4216d29958c0e1cdfcbc2afdbaec73b23c0e351e37",
    },
    "qwen2.5-coder-0.5b-instruct": {
        "tricky": "2b2ecd029973ace7808990dc72210c7dd2fc3943ef7f779179d870ca45c3547f",
        "wikitext": "b1715f70efdf937e6fc40ebeed44bd9957db782501b2f96c3292a1322710a59a",
    },
    "gemma-3-270m": {
        "tricky": "92df64749ce720894535a66ab8de8d63e8824c52849423595338a847b865bdd5",
        "wikitext": "803599d4e1f570dec6accf08975f21d39c4d4ae0eeec9a979eff82f1d25e1fa0",
    },
}
"""SHA-256 of the ids as little-endian int32: of `tricky_text` and of 300,000 characters of the
WikiText-2 test text (wikitext2_raw_test.txt in the folder that LEANKV_TEXTS names)."""
TYPES = dict(zip(DIGESTS, ("llama", "qwen2", "gemma3_text"), strict=True))
IK = """
import json, sys
from ik_llama_cpp._internals import IkModel
model, text = IkModel(sys.argv[1]), open(sys.argv[2], encoding="utf-8", newline="").read()
json.dump(model.tokenize(text, add_bos=False, special=True), open(sys.argv[3], "w"))
"""


@cache
def metadata(model: str) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    path = MODELS / f"{model}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not there; make real-models fetches it")
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@cache
def files(model: str) -> dict[str, str]:
    return tokenizer_files(metadata(model))


@cache
def tokenizer_of(model: str) -> Tokenizer:
    return Tokenizer.from_str(files(model)["tokenizer.json"])


def ids_of(model: str, text: str) -> list[int]:
    return list(tokenizer_of(model).encode(text, add_special_tokens=False).ids)


def text_named(name: str) -> str:
    if name == "tricky":
        return tricky_text()
    folder = os.environ.get("LEANKV_TEXTS")
    if not folder:
        pytest.skip("LEANKV_TEXTS names no folder with wikitext2_raw_test.txt")
    path = Path(folder) / "wikitext2_raw_test.txt"
    return path.read_bytes().decode()[:300_000]


def digest(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["tricky", "wikitext"])
@pytest.mark.parametrize("model", DIGESTS)
def test_ids_are_the_recorded_ones(model: str, name: str) -> None:
    assert digest(ids_of(model, text_named(name))) == DIGESTS[model][name]


@pytest.mark.parametrize("name", ["tricky", "wikitext"])
@pytest.mark.parametrize("model", DIGESTS)
def test_ids_are_those_of_ik_llama_cpp(model: str, name: str, tmp_path: Path) -> None:
    python = os.environ.get("LEANKV_IK_PYTHON")
    if not python:
        if importlib.util.find_spec("ik_llama_cpp") is None:
            pytest.skip("ik_llama_cpp is not installed, and LEANKV_IK_PYTHON names no interpreter")
        python = sys.executable
    text = text_named(name)
    metadata(model)  # skips without the model
    source, target = tmp_path / "text", tmp_path / "ids"
    source.write_bytes(text.encode())
    command = [python, "-c", IK, MODELS / f"{model}.gguf", source, target]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert ids_of(model, text) == json.loads(target.read_text())


@pytest.mark.parametrize("model", DIGESTS)
def test_text_comes_back_whole_and_streamed(model: str, tmp_path: Path) -> None:
    for name, content in files(model).items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": TYPES[model]}))
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=end_ids(metadata(model)))
    text = expected(model, tricky_text())

    # transformers reads every qwen2 folder as Qwen's own tokenizer, which composes characters.
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == ids_of(model, unicodedata.normalize("NFC", text) if "qwen" in model else text)

    ids = ids_of(model, text)
    stream = tokenizer.detokenizer
    assert type(stream).__name__ != "NaiveStreamingDetokenizer"
    streamed = ""
    for i in ids:
        stream.add_token(i)
        streamed += stream.last_segment
    stream.finalize()
    assert tokenizer.decode(ids) == text
    assert streamed + stream.last_segment == text


def expected(model: str, text: str) -> str:
    """The text without what the model's vocabulary cannot say."""
    if model == "gemma-3-270m":
        return text.replace("\u2581", " ")
    if model == "smollm2-135m-instruct":  # it has no tokens for some bytes
        lacking = bytes((0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2))
        return "".join(char for char in text if not set(char.encode()) & set(lacking))
    # Qwen2Tokenizer takes a long s for an s behind an apostrophe; llama.cpp does not.
    return text.replace("'\u017f", "")


def test_who_ends_a_reply() -> None:
    named = {
        model: [metadata(model)["tokenizer.ggml.tokens"][i] for i in end_ids(metadata(model))]
        for model in DIGESTS
    }
    assert named == {
        "smollm2-135m-instruct": ["<|im_end|>", "<|endoftext|>"],
        "qwen2.5-coder-0.5b-instruct": ["<|im_end|>", "<|endoftext|>"],
        "gemma-3-270m": ["<eos>", "<end_of_turn>"],
    }
