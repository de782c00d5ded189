"""From the tokenizer in a GGUF file's metadata to the files of a model folder.

The metadata is not trusted: whatever it holds, the result is files that load or one ModelError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from leankv_mlx.errors import ModelError
from leankv_mlx.models.bpe import PRE_TOKENIZERS, PreTokenizer, byte_level, sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_PIECE = 256  # characters; SentencePiece makes 16. The time for merges is bounded by it.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SENTENCEPIECE_ROLES = {"bos": 1, "eos": 2, "unk": 0}  # where the file does not name them
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<EOT>",
    "<|return|>",
    "<|call|>",
)
"""Tokens that end a turn or a text, known by their name: files mark only one of them."""
_MATCHED = frozenset((*_ENDS, "</s>", "<eos>", "[EOS]", "[EOT]"))
"""Names of tokens that llama.cpp matches in the text also where the file calls them normal."""


class _Type(IntEnum):
    """`tokenizer.ggml.token_type`; a token of any other type is as a normal one."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The checked parts that both kinds of tokenizer have.

    Attributes:
        tokens: by id, none twice.
        types: a `_Type` of each; int64.
        roles: id of the token that is bos, eos, unk or pad, where there is one.
    """

    tokens: list[str]
    types: npt.NDArray[np.int64]
    roles: dict[str, int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def matched(self) -> npt.NDArray[np.bool_]:
        """Which are found in a text before anything else is done to it; [tokens]."""
        return np.isin(self.types, (_Type.CONTROL, _Type.UNKNOWN, _Type.USER_DEFINED))


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The tokenizer of a GGUF file as files of an mlx-lm folder.

    Text becomes the ids that llama.cpp makes of it when it parses special tokens. A text begins
    with the beginning-of-sequence token where the file, or failing that its kind of tokenizer,
    says so; an end is never appended, because a prompt is to be continued.

    Args:
        metadata: the file's key-value pairs. Arrays of strings are lists, arrays of numbers NumPy
            arrays or lists.

    Returns:
        File name to content: tokenizer.json, tokenizer_config.json, and chat_template.jinja if the
        file has a chat template.

    Raises:
        ModelError: the tokenizer is of an unknown kind, or the metadata is damaged.
    """
    vocabulary = _vocabulary(metadata)
    if _kind(metadata) == "gpt2":
        pre = _pre_tokenizer(metadata)
        tokenizer = byte_level(vocabulary.ids, _merges(metadata, vocabulary), pre)
        add_bos = pre.add_bos
    else:
        prefix = _flag(metadata, "add_space_prefix", True)
        tokenizer = sentencepiece(vocabulary.ids, _ranked(metadata, vocabulary), prefix)
        add_bos = True
    _add_tokens(tokenizer, vocabulary, strip=_is_phi3(metadata))
    if _flag(metadata, "add_bos_token", add_bos):
        _prepend_bos(tokenizer, vocabulary)

    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    matched = vocabulary.matched
    for role, i in vocabulary.roles.items():
        if matched[i]:  # transformers would match it, and some files say that a comma is bos
            config[f"{role}_token"] = vocabulary.tokens[i]
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = _text(template, "tokenizer.chat_template")
    return files


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a reply, for `eos_token_id` of config.json; the file's own eos comes first.

    mlx-lm stops at these and at the tokenizer's eos.

    Raises:
        ModelError: the metadata is damaged.
    """
    tokens = _strings(metadata, "tokens")
    named = [_id(metadata, f"{key}_token_id", len(tokens)) for key in ("eos", "eot", "eom")]
    if named[0] is None and _kind(metadata) == "llama":
        named[0] = _SENTENCEPIECE_ROLES["eos"]
    ids = {token: i for i, token in enumerate(tokens)}
    found = {name: ids[name] for name in _ENDS if name in ids}
    if "<|return|>" in found and "<|call|>" in found:
        found.pop("<|end|>", None)  # gpt-oss: it ends a part of a reply
    return list(dict.fromkeys(i for i in [*named, *found.values()] if i is not None))


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_strings(metadata, "tokens"))]
    if not tokens:
        raise _damaged("it has no tokens")
    if len(set(tokens)) != len(tokens):
        raise _damaged("a token occurs twice")
    types = np.full(len(tokens), _Type.NORMAL, np.int64)
    if "tokenizer.ggml.token_type" in metadata:
        types = _numbers(metadata, "token_type", "iu", len(tokens)).astype(np.int64)
    for i, token in enumerate(tokens):
        if token in _MATCHED and types[i] != _Type.USER_DEFINED:
            types[i] = _Type.CONTROL
    roles = dict(_SENTENCEPIECE_ROLES) if _kind(metadata) == "llama" else {}
    for role, key in _ROLES.items():
        named = _id(metadata, f"{key}_token_id", len(tokens))
        if named is not None:
            roles[role] = named
    if max(roles.values(), default=0) >= len(tokens):
        raise _damaged(f"it has only {len(tokens)} tokens")
    return _Vocabulary(tokens, types, roles)


def _kind(metadata: Mapping[str, Any]) -> str:
    kind = _text(metadata.get("tokenizer.ggml.model"), "tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"this GGUF file has a tokenizer of the kind {_shown(kind)}, and gpt2 and llama are "
            "the ones that can be read; take the model as an mlx-lm folder instead."
        )
    return kind


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _text(metadata.get("tokenizer.ggml.pre", "default"), "tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"this GGUF file's pre-tokenizer {_shown(name)} is not known; "
            "take the model as an mlx-lm folder instead."
        )
    return PRE_TOKENIZERS[name]


def _merges(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    known = set(vocabulary.tokens)
    pairs: dict[tuple[str, str], None] = {}  # of a pair that occurs twice the first rank counts
    for merge in _strings(metadata, "merges"):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= known:
            raise _damaged(f"the merge {_shown(merge)} is not one of tokens")
        pairs[left, right] = None
    return list(pairs)


def _ranked(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> list[str]:
    """The tokens that text may merge to, highest score first.

    Those that are matched in the text beforehand are not among them.
    """
    tokens, data = vocabulary.tokens, set(_BYTES)
    if not data <= set(tokens):
        raise _damaged("it lacks tokens of single bytes")
    if any(token.startswith("<0x") and token not in data for token in tokens):
        raise _damaged("a token looks like a byte and is none")  # mlx-lm would take it for one
    scores = _numbers(metadata, "scores", "fiu", len(tokens)).astype(np.float64)
    if not np.isfinite(scores).all():
        raise _damaged("a score is not a number")
    matched = vocabulary.matched
    ranked = [tokens[i] for i in np.argsort(-scores, kind="stable") if not matched[i]]
    if max(map(len, ranked), default=0) > _MAX_PIECE:
        raise _damaged(f"a token has more than {_MAX_PIECE} characters")
    return ranked


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, strip: bool) -> None:
    """Mark the tokens that are found in a text before anything else is done to it."""
    from tokenizers import AddedToken

    keeps = {"<unk>", "<s>", "<|endoftext|>"}  # white space behind them, also in Phi-3
    plain: list[AddedToken] = []
    special: list[AddedToken] = []
    for i in np.flatnonzero(vocabulary.matched):
        token, of_user = vocabulary.tokens[i], vocabulary.types[i] == _Type.USER_DEFINED
        rstrip = strip and token not in keeps
        added = AddedToken(token, normalized=False, special=not of_user, rstrip=rstrip)
        (plain if of_user else special).append(added)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Phi-3 swallows white space behind its special tokens, which only its name tells."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _prepend_bos(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    from tokenizers import processors

    if "bos" not in vocabulary.roles:
        raise _damaged("it has no beginning-of-sequence token, though texts are to begin with it")
    i = vocabulary.roles["bos"]
    # By a name of ours: the token may contain spaces, colons or a dollar.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["bos", "$A"],
        pair=["bos", "$A", "bos", "$B:1"],
        special_tokens=[{"id": "bos", "ids": [i], "tokens": [vocabulary.tokens[i]]}],
    )


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _damaged(f"tokenizer.ggml.{key} is missing or is no list of strings")
    _text("".join(value), f"tokenizer.ggml.{key}")
    return value


def _numbers(
    metadata: Mapping[str, Any], key: str, kinds: str, length: int
) -> npt.NDArray[np.generic]:
    """An array [length] whose dtype is of one of NumPy's kinds."""
    try:
        array = np.asarray(metadata.get(f"tokenizer.ggml.{key}"))
    except (ValueError, OverflowError):
        array = np.empty(0, object)
    if array.dtype.kind not in kinds or array.shape != (length,):
        raise _damaged(f"tokenizer.ggml.{key} is not {length} numbers")
    return array


def _id(metadata: Mapping[str, Any], key: str, length: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise _damaged(f"tokenizer.ggml.{key} is no number")
    if not 0 <= value < length:
        raise _damaged(f"tokenizer.ggml.{key} is not the id of one of {length} tokens")
    return int(value)


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, (bool, np.bool_)):
        raise _damaged(f"tokenizer.ggml.{key} is neither true nor false")
    return bool(value)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise _damaged(f"{key} is missing or is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _damaged(f"{key} is not UTF-8") from None
    return value


def _damaged(reason: str) -> ModelError:
    return ModelError(f"this GGUF file's tokenizer is damaged: {reason}.")


def _shown(text: str) -> str:
    """Text of the file as a message may hold it: short, and without control characters."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
