"""Tokenizers of GGUF files become files that transformers and mlx-lm load."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer

from leankv_mlx.errors import ModelError
from leankv_mlx.models.bpe import PRE_TOKENIZERS
from leankv_mlx.models.vocabulary import end_ids, tokenizer_files
from tests.gguf.texts import tricky_text
from tests.gguf.vocabularies import TEMPLATE, byte_level, sentencepiece


def built(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(metadata)["tokenizer.json"])


def words(metadata: dict[str, Any], text: str) -> list[str]:
    """The tokens of a text, without what stands before it."""
    tokenizer = built(metadata)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [metadata["tokenizer.ggml.tokens"][i] for i in ids]


def test_byte_level_merges_in_the_order_of_the_file() -> None:
    assert words(byte_level(), "hello hello") == ["hello", "Ġhello"]
    assert words(byte_level(), "hell  hello") == ["hell", "Ġ", "Ġhello"]


def test_ids_are_those_of_the_file() -> None:
    metadata = byte_level()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = built(metadata)
    assert [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())] == tokens


def test_byte_level_text_comes_back() -> None:
    tokenizer = built(byte_level())
    text = tricky_text()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_first_of_two_ranks_counts() -> None:
    merges = byte_level()["tokenizer.ggml.merges"]
    tokens = words(byte_level(merges=["l l", *merges, "l l"]), "hello")
    assert tokens == ["hello"]
    assert words(byte_level(merges=[*merges, "h e"]), "hello") == ["hello"]


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("default", ["ab", "Ġ", "123", "45", "ĠĠ", "+", "x", "'", "S"]),
        ("gpt-2", ["ab", "Ġ12345", "Ġ", "Ġ+", "x", "'", "S"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġ+", "x", "'", "S"]),
        ("falcon", ["ab", "Ġ", "123", "45", "ĠĠ", "+", "x", "'", "S"]),
        ("llama-bpe", ["ab", "Ġ", "123", "45", "Ġ", "Ġ+", "x", "'S"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġ+", "x", "'S"]),
        ("tekken", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġ+", "x", "'S"]),
        ("gpt-4o", ["ab", "Ġ", "123", "45", "Ġ", "Ġ+", "x'S"]),
        ("deepseek-llm", ["ab", "Ġ", "12345", "Ġ", "Ġ+", "x", "'", "S"]),
    ],
)
def test_each_pre_tokenizer_cuts_in_its_own_way(pre: str, cut: list[str]) -> None:
    pre_tokenizer = built(byte_level(pre=pre)).pre_tokenizer
    assert [word for word, _ in pre_tokenizer.pre_tokenize_str("ab 12345  +x'S")] == cut


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_no_pre_tokenizer_loses_text(pre: str) -> None:
    tokenizer = built(byte_level(pre=pre))
    text = tricky_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_combining_mark_belongs_to_its_letter_for_qwen35_only() -> None:
    def cut(pre: str) -> int:
        return len(built(byte_level(pre=pre)).pre_tokenizer.pre_tokenize_str("e\u0301a"))

    assert (cut("qwen35"), cut("qwen2")) == (1, 2)


def test_llama_3_keeps_a_word_that_is_a_token() -> None:
    metadata = byte_level(merges=["h e"])
    assert words(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, "hello") == ["hello"]
    assert words(metadata, "hello") == ["he", "l", "l", "o"]


def test_a_byte_without_a_token_gives_no_id_and_parts_its_neighbours() -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.tokens"].index("Ą")] = "[PAD]"
    assert words(metadata, "!!") == ["!!"]
    assert words(metadata, "!\x04!") == ["!", "!"]


def test_sentencepiece_merges_the_highest_score_first() -> None:
    plain = sentencepiece(add_space_prefix=False)
    assert words(plain, "abc") == ["abc"]
    assert words(plain, "bbc") == ["b", "bc"]
    assert words(plain, "aaaaa") == ["aa", "aaa"]
    assert words(plain, "aab") == ["a", "ab"]
    scores = plain["tokenizer.ggml.scores"].copy()
    scores[plain["tokenizer.ggml.tokens"].index("aa")] = 0.0
    assert words(plain | {"tokenizer.ggml.scores": scores}, "aab") == ["aa", "b"]


def test_sentencepiece_writes_unknown_characters_as_bytes() -> None:
    tokens = words(sentencepiece(add_space_prefix=False), "你😀\r\n")
    assert tokens == ["你", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x0D>", "<0x0A>"]


def test_a_space_comes_before_a_text_and_after_special_tokens() -> None:
    assert words(sentencepiece(), "a b</s>a") == ["▁a", "▁", "b", "</s>", "▁a"]
    assert words(sentencepiece(add_space_prefix=False), "a b</s>a")[0] == "a"


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_text_comes_back(prefix: bool) -> None:
    tokenizer = built(sentencepiece(add_space_prefix=prefix))
    text = tricky_text().replace("▁", "_")
    text = re.sub("</s>|<s>|<unk>|  +", "x", text)  # these are tokens, and a space comes after them
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokens_of_the_user_and_control_tokens_are_found_in_text() -> None:
    assert words(byte_level(), "a<tool><|im_end|>") == ["a", "<tool>", "<|im_end|>"]
    assert words(sentencepiece(add_space_prefix=False), "a  b") == ["a", "  ", "b"]
    tokenizer = built(byte_level())
    ids = tokenizer.encode("<tool><|im_end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"


def test_a_token_that_ends_a_turn_is_special_whatever_its_type() -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.token_type"] = np.ones_like(metadata["tokenizer.ggml.token_type"])
    assert words(metadata, "a<|im_end|>") == ["a", "<|im_end|>"]
    del metadata["tokenizer.ggml.token_type"]
    assert words(metadata, "a<|im_end|>") == ["a", "<|im_end|>"]


def test_phi_3_swallows_white_space_behind_its_tokens() -> None:
    metadata = sentencepiece(add_space_prefix=False)
    assert words(metadata, "</s> a") == ["</s>", "▁a"]
    assert words(metadata | {"general.name": "Phi-3 Mini"}, "</s> \na") == ["</s>", "a"]
    assert words(metadata | {"general.name": "Phi-3 Mini"}, "<s> a") == ["<s>", "▁a"]


@pytest.mark.parametrize(
    ("metadata", "first"),
    [
        (byte_level(), "h"),
        (byte_level(add_bos_token=True), "<|endoftext|>"),
        (byte_level(add_bos_token=None), "h"),
        (byte_level(add_bos_token=None, pre="llama-bpe"), "<|endoftext|>"),
        (byte_level(add_bos_token=False, pre="llama-bpe"), "h"),
        (sentencepiece(add_space_prefix=False), "<s>"),
        (sentencepiece(add_space_prefix=False, add_bos_token=False), "<0x68>"),
        (sentencepiece(bos_token_id=2), "</s>"),
    ],
)
def test_a_text_begins_as_the_file_or_its_kind_says(metadata: dict[str, Any], first: str) -> None:
    encoding = built(metadata).encode("h")
    assert encoding.tokens[0] == first
    assert built(metadata).encode("h", add_special_tokens=False).tokens[0] != "<s>"


def test_roles_are_in_the_configuration() -> None:
    config = json.loads(tokenizer_files(byte_level())["tokenizer_config.json"])
    assert config["bos_token"] == "<|endoftext|>" and config["eos_token"] == "<|im_end|>"
    assert "unk_token" not in config and "pad_token" not in config
    config = json.loads(tokenizer_files(sentencepiece())["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )


def test_a_normal_token_with_a_role_is_not_matched_in_text(tmp_path: Path) -> None:
    metadata = byte_level(bos_token_id=0)
    assert metadata["tokenizer.ggml.tokens"][0] == "!"
    write_folder(tmp_path, metadata, "qwen3")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_token is None
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("!!")) == ["!!"]


def test_end_ids() -> None:
    metadata = byte_level()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert end_ids(metadata) == [tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")]
    metadata["tokenizer.ggml.eos_token_id"] = 5
    metadata["tokenizer.ggml.eot_token_id"] = 7
    assert end_ids(metadata)[:2] == [5, 7] and len(end_ids(metadata)) == 4
    assert end_ids(sentencepiece()) == [2]


def test_the_end_of_a_part_is_no_end_where_there_is_a_return() -> None:
    metadata = byte_level()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[:3] = ["<|end|>", "<|return|>", "<|call|>"]
    assert tokens.index("<|end|>") not in end_ids(metadata)
    assert {1, 2} < set(end_ids(metadata))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_mlx_lm_loads_it_and_streams_what_it_decodes(
    tmp_path: Path, model_type: str, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if model_type == "qwen2" and make is sentencepiece:
        pytest.skip("transformers reads a qwen2 folder as byte-level BPE, whatever it holds")
    metadata = make() | {"tokenizer.chat_template": TEMPLATE}
    write_folder(tmp_path, metadata, model_type)
    ends = end_ids(metadata)
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=ends)
    assert tokenizer.eos_token_ids == set(ends)
    assert not caplog.records

    messages = [{"role": "user", "content": "hello \U0001f600 \r\n"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == ("<|im_start|>user\nhello \U0001f600 \r\n<|im_end|>\n<|im_start|>assistant\n")
    raw = built(metadata)
    text = "hello 👩‍👩‍👧 你好 \U0001f1e9\U0001f1ea abc \n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == raw.encode(text, add_special_tokens=False).ids
    stream = tokenizer.detokenizer
    assert type(stream).__name__ != "NaiveStreamingDetokenizer"  # it is quadratic in a line
    streamed = ""
    for i in ids:
        stream.add_token(i)
        streamed += stream.last_segment
    stream.finalize()
    assert streamed + stream.last_segment == tokenizer.decode(ids) == text


def test_a_leading_space_is_kept_where_no_space_is_put_before(tmp_path: Path) -> None:
    write_folder(tmp_path, sentencepiece(add_space_prefix=False), "gemma3_text")
    tokenizer = load_tokenizer(tmp_path)
    stream = tokenizer.detokenizer
    for i in tokenizer.encode(" ab", add_special_tokens=False):
        stream.add_token(i)
    stream.finalize()
    assert stream.text == " ab"


def write_folder(folder: Path, metadata: dict[str, Any], model_type: str) -> None:
    for name, content in tokenizer_files(metadata).items():
        (folder / name).write_text(content, encoding="utf-8", newline="")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def test_the_chat_template_is_the_file_s_own() -> None:
    assert "chat_template.jinja" not in tokenizer_files(byte_level())
    files = tokenizer_files(byte_level() | {"tokenizer.chat_template": TEMPLATE})
    assert files["chat_template.jinja"] == TEMPLATE


def tokens_with(i: int, token: str) -> list[str]:
    tokens: list[str] = sentencepiece()["tokenizer.ggml.tokens"]
    tokens[i] = token
    return tokens


LENGTH = len(sentencepiece()["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (byte_level(model=None), "tokenizer.ggml.model is missing"),
        (byte_level(model="t5"), "of the kind 't5'"),
        (byte_level(model="\x1b[2J" * 99), r"\\x1b\[2J"),
        (byte_level(pre="kimi-k2"), "'kimi-k2' is not known"),
        (byte_level(pre=3), "pre is missing or is no text"),
        (byte_level(tokens=None), "tokens is missing"),
        (byte_level(tokens=[]), "no tokens"),
        (byte_level(tokens=["a", 1]), "no list of strings"),
        (byte_level(tokens=["a", "a"]), "occurs twice"),
        (byte_level(tokens=["a", "\ud800"]), "not UTF-8"),
        (byte_level(merges=None), "merges is missing"),
        (byte_level(merges=["ab"]), "'ab' is not one of tokens"),
        (byte_level(merges=["h h"]), "'h h' is not one of tokens"),
        (byte_level(token_type=np.ones(3, np.int32)), "token_type is not 267 numbers"),
        (byte_level(token_type=np.ones(267)), "token_type is not 267 numbers"),
        (byte_level(token_type=[[1], [2, 3]]), "token_type is not 267 numbers"),
        (byte_level(eos_token_id=267), "eos_token_id is not the id of one of 267"),
        (byte_level(bos_token_id=-1), "bos_token_id is not the id"),
        (byte_level(bos_token_id="1"), "bos_token_id is no number"),
        (byte_level(bos_token_id=True), "bos_token_id is no number"),
        (byte_level(add_bos_token=1), "add_bos_token is neither true nor false"),
        (byte_level(add_bos_token=True, bos_token_id=None), "no beginning-of-sequence token"),
        (byte_level() | {"tokenizer.chat_template": ["x"]}, "chat_template is missing or is no"),
        (byte_level() | {"tokenizer.chat_template": "\udfff"}, "chat_template is not UTF-8"),
        (sentencepiece(scores=None), f"scores is not {LENGTH} numbers"),
        (sentencepiece(scores=np.zeros(3, np.float32)), f"scores is not {LENGTH} numbers"),
        (sentencepiece(scores=["a"] * LENGTH), f"scores is not {LENGTH} numbers"),
        (sentencepiece(scores=np.full(LENGTH, np.nan)), "a score is not a number"),
        (sentencepiece(tokens=tokens_with(-3, "<0xZZ>")), "looks like a byte"),
        (sentencepiece(tokens=tokens_with(-4, "a" * 257)), "more than 256"),
        (sentencepiece(tokens=tokens_with(3, "<0xZZ>")), "lacks tokens of single bytes"),
        (sentencepiece(tokens=["a", "b"], token_type=None), "only 2 tokens"),
        (sentencepiece(add_space_prefix="yes"), "add_space_prefix is neither"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_said_in_a_line(
    metadata: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says) as error:
        tokenizer_files(metadata)
    assert str(error.value).isprintable() and len(str(error.value)) < 250


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_no_value_anywhere_raises_anything_but_a_model_error(make: Any) -> None:
    junk = [-1, 2**70, 0.5, float("nan"), "", "x", "\ud800", [], [""], ["a b"], [[]], [2**70], b"x"]
    junk += [None, True, np.zeros(LENGTH), np.zeros((2, 2)), np.array(["x"]), np.int64(1)]
    refused = 0
    for key in [*make(), "tokenizer.ggml.padding_token_id", "tokenizer.chat_template"]:
        for value in junk:
            for read in (tokenizer_files, end_ids):
                try:
                    read(make() | {key: value})
                except ModelError:
                    refused += 1
    assert refused > 100
